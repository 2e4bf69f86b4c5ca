"""How a fact is put into words: draws a statement or a question of a split.

A statement is a sentence (an opening, a clause, an ending) or one of the other structures. A
question is a request in a frame, or the beginning of a clause or structure that puts the value
last. So each statement can be asked for in another form, and each form takes part in both.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np

from ic.datamodules.facts.composed import compose
from ic.datamodules.facts.splits import check_split, pick
from ic.datamodules.facts.structures import STRUCTURES
from ic.datamodules.facts.wordings import (
    CLAUSES,
    ENDINGS,
    FRAMES,
    LEADS,
    OPENINGS,
    REQUESTS,
    WRAPPERS,
)
from ic.datamodules.facts.words import draw_word

SENTENCE, REQUEST, COMPOSED = "sentence", "request", "composed"
_PLACE = re.compile(r"\{([a-zA-Z])\}")
_OPENING_SHARE, _ENDING_SHARE, _WRAPPED_SHARE = 0.4, 0.25, 0.15  # of the sentences
_BEGUN_SHARE = 0.3  # of the questions of a conversation
_EXAMPLE = "{e} {a} {v}"
# How often a fact is stated and asked for in these kinds; the others share the rest.
_STATED, _ASKED = {SENTENCE: 0.5, COMPOSED: 0.3}, {REQUEST: 0.7, COMPOSED: 0.3}


@dataclass(frozen=True)
class Statement:
    """Text that states a fact.

    Attributes:
        kind: `sentence` or one of the structures.
        wording: the clause or the structure that it was made of.
        own_line: whether it has to stand on lines of its own.
    """

    text: str
    kind: str
    wording: str
    own_line: bool


@dataclass(frozen=True)
class Question:
    """Text that ends right before the value; after the value comes `end`.

    Attributes:
        gap: what stands between the text and the value: a space or nothing.
        kind: `request`, `sentence` or one of the structures.
    """

    text: str
    gap: str
    end: str
    kind: str
    own_line: bool


@cache
def statement_kinds(split: str) -> tuple[str, ...]:
    """The kinds in which a split states facts when none is named."""
    check_split(split)
    composed = (COMPOSED,) if split == "train" else ()
    return (SENTENCE, *composed, *(kind for kind, forms in STRUCTURES.items() if split in forms))


def question_kinds(split: str) -> tuple[str, ...]:
    """The kinds in which a split asks for facts when none is named."""
    return (REQUEST, *statement_kinds(split))


def draw_statement(
    rng: np.random.Generator,
    split: str,
    entity: str,
    attribute: str,
    value: str,
    *,
    kind: str | None = None,
    wording: str | None = None,
    names_attribute: bool = False,
    forms: Collection[str] = (),
) -> Statement:
    """A statement in a form of the split.

    Args:
        kind: one of `statement_kinds`, drawn if not given.
        wording: that of another statement of the same kind, to be used again.
        names_attribute: leave out forms that state a value without saying of what.
        forms: kinds from which to draw; all if empty.

    Raises:
        ValueError: an unknown split or kind, or one that the split has no form of.
    """
    able = _stating(split, names_attribute)
    allowed = tuple(name for name in able if not forms or name in forms)
    kind = _kind(rng, split, kind, allowed, _STATED)
    if wording is None and kind == COMPOSED:
        wording = compose(rng, names_attribute=names_attribute)
    wording = wording or pick(rng, able[kind])
    text = fill(rng, split, wording, entity, attribute, value)
    if kind != SENTENCE:
        return Statement(text, kind, wording, True)
    text += "."
    opening = pick(rng, OPENINGS[split]) if rng.random() < _OPENING_SHARE else ""
    goes_on = opening.endswith(", ") or opening[-2:-1].isalpha()
    text = opening + (text if goes_on else begin(wording, text))
    if rng.random() < _ENDING_SHARE:
        text += pick(rng, ENDINGS[split])
    if rng.random() < _WRAPPED_SHARE:
        text = pick(rng, WRAPPERS[split]).replace("{t}", text)
    return Statement(text, kind, wording, False)


def draw_question(
    rng: np.random.Generator,
    split: str,
    entity: str,
    attribute: str,
    *,
    kind: str | None = None,
    not_wording: str = "",
    names_attribute: bool = False,
    forms: Collection[str] = (),
) -> Question:
    """A question in a form of the split.

    Args:
        kind: one of `question_kinds`, drawn if not given.
        not_wording: the wording of the statement, which the question does not use again.
        names_attribute: leave out forms that ask for a value without saying of what.
        forms: kinds from which to draw; all if empty.

    Raises:
        ValueError: an unknown split or kind, or one that the split cannot ask in.
    """
    able = {
        name: others
        for name, texts in _asking(split, names_attribute).items()
        if (others := [text for text in texts if text != not_wording])
    }
    allowed = tuple(name for name in (REQUEST, *able) if not forms or name in forms)
    # A form that stated the fact cannot ask for it; if it is the only one, a request does.
    kind = _kind(rng, split, kind, allowed or (REQUEST,), _ASKED)
    if kind == REQUEST:
        stated = not_wording.partition("{v}")[0].strip()
        lead = pick(rng, [lead for lead in LEADS[split] if not lead or lead != stated])
        frame = pick(rng, FRAMES[split])
        form = frame.replace("{q}", pick(rng, REQUESTS[split])).replace("{l}", f"{lead} ".lstrip())
        before = fill(rng, split, form, entity, attribute, "")
        return _question(begin(form, before), ".", kind, False)
    form = pick(rng, able[kind])
    if kind == COMPOSED:
        form = compose(rng, value_last=True, names_attribute=names_attribute)
    before, after = form.split("{v}")
    text = fill(rng, split, before, entity, attribute, "")
    if kind == SENTENCE:
        return _question(begin(before, text), ".", kind, False)
    # What ends the value is seen: a space alone might be one amid the value.
    spaces = len(after) - len(after.lstrip(" "))
    return _question(text, after[: spaces + 1] or "\n", kind, True)


def draw_turns(
    rng: np.random.Generator, split: str, entity: str, attribute: str, value: str
) -> tuple[str, str]:
    """What the user asks in a conversation, and what the assistant answers: words of the split,
    before the value too, which the user may have begun.
    """
    request, lead = pick(rng, REQUESTS[split]), pick(rng, LEADS[split])
    asked = begin(request, fill(rng, split, request, entity, attribute, ""))
    begun = begin(lead, fill(rng, split, lead, entity, attribute, ""))
    if begun and rng.random() < _BEGUN_SHARE:
        return f"{asked} {begun}", f"{value}."
    return asked, f"{begun} {value}.".lstrip()


def _question(before: str, end: str, kind: str, own_line: bool) -> Question:
    gap = " " if before.endswith(" ") else ""
    return Question(before.removesuffix(" "), gap, end, kind, own_line)


def _kind(
    rng: np.random.Generator,
    split: str,
    kind: str | None,
    allowed: tuple[str, ...],
    share_of: dict[str, float],
) -> str:
    """The kind asked for, or one of the allowed; some have a share, the others share the rest."""
    if kind is not None:
        if kind not in allowed:
            raise ValueError(
                f"kind={kind!r}: {split!r} has no such form here; choose from {', '.join(allowed)}"
            )
        return kind
    for name, share in share_of.items():
        if name in allowed and rng.random() < share:
            return name
    return pick(rng, [name for name in allowed if name not in share_of] or allowed)


@cache
def _stating(split: str, names_attribute: bool) -> dict[str, tuple[str, ...]]:
    """The forms of each kind; of `composed`, which has no end of them, an example."""
    forms = {
        kind: CLAUSES[split]
        if kind == SENTENCE
        else STRUCTURES.get(kind, {}).get(split, (_EXAMPLE,))
        for kind in statement_kinds(split)
    }
    if names_attribute:
        named = re.compile(r"\{[aAscS]\}")
        forms = {kind: tuple(filter(named.search, texts)) for kind, texts in forms.items()}
    return {kind: texts for kind, texts in forms.items() if texts}


@cache
def _asking(split: str, names_attribute: bool) -> dict[str, tuple[str, ...]]:
    """The forms of each kind that name the entity before the value, and the value once."""

    def asks(form: str) -> bool:
        before, value, after = form.partition("{v}")
        return bool(value) and "{e}" in before and not _PLACE.search(after)

    forms = _stating(split, names_attribute)
    return {kind: able for kind in forms if (able := tuple(filter(asks, forms[kind])))}


def fill(
    rng: np.random.Generator, split: str, form: str, entity: str, attribute: str, value: str
) -> str:
    """The form with its places filled."""

    def text(match: re.Match[str]) -> str:
        place = match.group(1)
        if place == "n":
            return str(int(rng.integers(1, 10_000)))
        if place == "w":
            return draw_word(rng, split)
        return filled[place]

    words = attribute.split()
    if attribute[0].lower() in "aeiou":
        form = form.replace(" a {a}", " an {a}")
    filled = {
        "e": entity,
        "a": attribute,
        "v": value,
        "A": _upper(attribute),
        "s": "_".join(words).lower(),
        "c": words[0].lower() + "".join(word.capitalize() for word in words[1:]),
        "S": "_".join(words).upper(),
    }
    return _PLACE.sub(text, form)


def begin(form: str, text: str) -> str:
    """The text as a sentence begins; values, and names but for their article, stay as they are."""
    if form.startswith("{v}") or (form.startswith("{e}") and not text.startswith("the ")):
        return text
    return _upper(text)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
