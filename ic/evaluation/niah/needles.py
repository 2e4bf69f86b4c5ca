"""What is hidden and asked for: facts of held-out forms, names and kinds of keys, by task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ic.datamodules.facts.fact import Fact, draw_fact, draw_facts, draw_nonliteral_fact
from ic.datamodules.facts.forms import REQUEST, SENTENCE, draw_statement, statement_kinds
from ic.datamodules.facts.keys import draw_key, key_kinds
from ic.datamodules.facts.splits import pick
from ic.errors import check_choice
from ic.evaluation.niah.grid import NON_LITERAL, Config

_MOST_DRAWS = 1000


@dataclass(frozen=True)
class Needle:
    """A statement, and whether it has to stand on lines of its own."""

    text: str
    own_line: bool

    @property
    def inserted(self) -> str:
        """As it stands behind the end of a sentence."""
        return f"\n{self.text}\n" if self.own_line else f" {self.text}"


@dataclass(frozen=True)
class Needles:
    """A question, and what is hidden for it.

    Attributes:
        needle: what the answer needs, whose depth is reported.
        others: at any depth: distractors, or the other values.
        question: ends right before the answer.
        values: what is asked for, in the order of the text.
        answer: how a right answer reads on.
        other_values: what the distractors hold.
    """

    needle: Needle
    others: tuple[Needle, ...]
    question: str
    values: tuple[str, ...]
    answer: str
    other_values: tuple[str, ...] = ()


def check_kinds(options: Config) -> None:
    """Refuse kinds of keys and records that the forms do not have.

    Raises:
        ValueError: a kind that there is not, or that is held out for another split.
    """
    rng = np.random.default_rng(0)
    for kind in options.kinds:
        try:
            draw_key(rng, options.forms, kind)
        except ValueError as error:
            raise ValueError(f"{options.key('kinds')}: {error}") from None
    for kind in options.records:
        check_choice("suite.niah.records", kind, _kinds_of_records(options.forms))


def kinds_of_keys(options: Config) -> tuple[str, ...]:
    """The kinds that were chosen, or those of the split."""
    return tuple(options.kinds) or key_kinds(options.forms)


def _kinds_of_records(forms: str) -> tuple[str, ...]:
    return tuple(kind for kind in statement_kinds(forms) if kind != SENTENCE)


def draw_needles(rng: np.random.Generator, options: Config, task: str, kind: str) -> Needles:
    """What a sample of a task hides and asks for."""
    forms, count = options.forms, options.num_needles
    if task == NON_LITERAL:
        return _asked([draw_nonliteral_fact(rng, forms)])
    if task == "own_words":
        return _own_words(rng, forms, kind)
    if task == "multi_value":
        return _multi_value(rng, forms, kind, count)
    if task == "records":
        record = pick(rng, tuple(options.records) or _kinds_of_records(forms))
        facts = draw_facts(
            rng,
            forms,
            count + 1,
            alike=True,
            key_kind=kind,
            statement_kind=record,
            question_kind=REQUEST,
        )
        return _asked(facts)
    several = task in ("multi_key", "multi_attribute")
    try:
        facts = draw_facts(
            rng,
            forms,
            count + 1 if several else 1,
            alike=task == "multi_key",
            facts_per_entity=count + 1 if task == "multi_attribute" else 1,
            key_kind=kind,
            statement_kind=SENTENCE,
            question_kind=REQUEST,
            paraphrase=task == "paraphrase",
        )
    except ValueError as error:  # the split has no more attributes, or names
        raise ValueError(f"{options.key('num_needles')}: too many for {task} ({error})") from None
    return _asked(facts)


def _asked(facts: list[Fact]) -> Needles:
    """The first fact is asked for."""
    first, *others = (Needle(fact.statement, fact.own_line) for fact in facts)
    fact, *distractors = facts
    values = tuple(distractor.value for distractor in distractors)
    return Needles(first, tuple(others), fact.question, (fact.value,), fact.answer, values)


def _own_words(rng: np.random.Generator, forms: str, kind: str) -> Needles:
    """A sentence that ends with its value, and the same up to it."""
    for _ in range(_MOST_DRAWS):
        fact = draw_fact(rng, forms, key_kind=kind, statement_kind=SENTENCE)
        if fact.wording.endswith(" {v}"):
            question = fact.statement.partition(f" {fact.value}.")[0]
            needle = Needle(fact.statement, fact.own_line)
            return Needles(needle, (), question, (fact.value,), f" {fact.value}.")
    raise ValueError(f"suite.niah.forms={forms}: no sentence of it ends with its value")


def _multi_value(rng: np.random.Generator, forms: str, kind: str, count: int) -> Needles:
    """Values of one attribute of one entity, each stated in a sentence of its own form."""
    fact = draw_fact(rng, forms, key_kind=kind, statement_kind=SENTENCE)
    values = [fact.value]
    while len(values) < count:
        value = draw_key(rng, forms, kind).text
        values += [value] if value not in values else []
    sentences = [
        draw_statement(rng, forms, fact.entity, fact.attribute, value, kind=SENTENCE)
        for value in values
    ]
    first, *others = (Needle(sentence.text, sentence.own_line) for sentence in sentences)
    question = (
        f"The text gives {count} different values for the {fact.attribute} of {fact.entity}. "
        "All of them, one behind the other, are"
    )
    return Needles(first, tuple(others), question, tuple(values), f" {', '.join(values)}.")
