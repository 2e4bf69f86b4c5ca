"""How a fact is put into words: draws a statement or a question of a split.

A statement is a sentence (an opening, a clause, an ending) or one of the other structures. A
question is a request in a frame, or the beginning of a clause or structure that puts the value
last. So each statement can be asked for in another form, and each form takes part in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from ic.datamodules.facts.splits import check_split, pick
from ic.datamodules.facts.structures import STRUCTURES
from ic.datamodules.facts.wordings import CLAUSES, ENDINGS, FRAMES, LEADS, OPENINGS, REQUESTS
from ic.datamodules.facts.words import draw_word

SENTENCE, REQUEST = "sentence", "request"
_PLACE = re.compile(r"\{([a-zA-Z])\}")
_SENTENCE_SHARE = 0.5  # of the statements
_REQUEST_SHARE = 0.7  # of the questions
_OPENING_SHARE, _ENDING_SHARE = 0.4, 0.25


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
    return (SENTENCE, *(kind for kind, forms in STRUCTURES.items() if split in forms))


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
) -> Statement:
    """A statement in a form of the split.

    Args:
        kind: one of `statement_kinds`, drawn if not given.
        wording: that of another statement of the same kind, to be used again.

    Raises:
        ValueError: an unknown split or kind, or one that the split has no form of.
    """
    kind = _kind(rng, split, kind, statement_kinds(split), SENTENCE, _SENTENCE_SHARE)
    if kind != SENTENCE:
        form = wording or pick(rng, STRUCTURES[kind][split])
        text = fill(rng, split, form, entity, attribute, value)
        return Statement(text, kind, form, True)
    clause = wording or pick(rng, CLAUSES[split])
    text = fill(rng, split, clause, entity, attribute, value) + "."
    if rng.random() < _OPENING_SHARE:
        opening = pick(rng, OPENINGS[split])
        goes_on = opening[-2].isalpha() or opening.endswith(", ")
        text = opening + (text if goes_on else begin(clause, text))
    else:
        text = begin(clause, text)
    if rng.random() < _ENDING_SHARE:
        text += pick(rng, ENDINGS[split])
    return Statement(text, kind, clause, False)


def draw_question(
    rng: np.random.Generator,
    split: str,
    entity: str,
    attribute: str,
    *,
    kind: str | None = None,
    not_wording: str = "",
) -> Question:
    """A question in a form of the split.

    Args:
        kind: one of `question_kinds`, drawn if not given.
        not_wording: the wording of the statement, which the question does not use again.

    Raises:
        ValueError: an unknown split or kind, or one that the split cannot ask in.
    """
    forms = _asking(split, not_wording)
    able = (REQUEST, *forms)
    kind = _kind(rng, split, kind, able, REQUEST, _REQUEST_SHARE)
    if kind == REQUEST:
        stated = not_wording.partition("{v}")[0].strip()
        lead = pick(rng, [lead for lead in LEADS[split] if not lead or lead != stated])
        frame = pick(rng, FRAMES[split])
        form = frame.replace("{q}", pick(rng, REQUESTS[split])).replace("{l}", f"{lead} ".lstrip())
        before = fill(rng, split, form, entity, attribute, "")
        return _question(begin(form, before), ".", kind, False)
    before, after = pick(rng, forms[kind]).split("{v}")
    text = fill(rng, split, before, entity, attribute, "")
    if kind == SENTENCE:
        return _question(begin(before, text), ".", kind, False)
    # What ends the value is seen: a space alone might be one amid the value.
    spaces = len(after) - len(after.lstrip(" "))
    return _question(text, after[: spaces + 1] or "\n", kind, True)


def _question(before: str, end: str, kind: str, own_line: bool) -> Question:
    gap = " " if before.endswith(" ") else ""
    return Question(before.removesuffix(" "), gap, end, kind, own_line)


def _kind(
    rng: np.random.Generator,
    split: str,
    kind: str | None,
    allowed: tuple[str, ...],
    first: str,
    first_share: float,
) -> str:
    """The kind that was asked for, or a drawn one; the first has a share of its own."""
    if kind is None:
        return first if rng.random() < first_share else pick(rng, allowed[1:])
    if kind not in allowed:
        raise ValueError(
            f"kind={kind!r}: {split!r} has no such form here; choose from {', '.join(allowed)}"
        )
    return kind


@cache
def _asking(split: str, not_wording: str) -> dict[str, tuple[str, ...]]:
    """The forms of each kind that name the entity before the value, and the value once."""
    able = {}
    for kind in statement_kinds(split):
        forms = CLAUSES[split] if kind == SENTENCE else STRUCTURES[kind][split]
        asking = tuple(
            form
            for form in forms
            if form.count("{v}") == 1 and "{e}" in form.split("{v}")[0]
            if not _PLACE.search(form.split("{v}")[1]) and form != not_wording
        )
        if asking:
            able[kind] = asking
    return able


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
