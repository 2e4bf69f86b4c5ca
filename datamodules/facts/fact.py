"""Facts to hide in a text and to ask for: an entity, an attribute and a value, in many forms.

```python
rng = np.random.default_rng(0)
fact = draw_fact(rng, "test", key_kind="hex-8")
fact.statement  # goes into the text, on lines of its own if `fact.own_line`
fact.question   # ends right before `fact.answer`, in other words than the statement
fact.value      # what a right answer contains
needles = draw_facts(rng, "test", 5, alike=True)   # one to ask for and four distractors
```
Everything is a function of the generator and the split. Forms (clauses, openings, requests, kinds
of structure), kinds of keys and entities, attributes, words and names each belong to one split.
`train` draws nothing that belongs to another. `validation` and `test` draw their own forms,
attributes and kinds of keys; a kind of training that is asked for by name comes with keys of
theirs. Words are in `words.py`, keys in `keys.py`, forms in `wordings.py` and `structures.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ic.datamodules.facts.associations import ASSOCIATIONS, LEADS
from ic.datamodules.facts.attributes import Attribute, draw_attribute
from ic.datamodules.facts.entities import draw_entity
from ic.datamodules.facts.forms import SENTENCE, draw_question, draw_statement
from ic.datamodules.facts.keys import KEY_FAMILIES, draw_key
from ic.datamodules.facts.splits import check_split, pick

_MOST_DRAWS = 1000


@dataclass(frozen=True)
class Fact:
    """A fact, the text that states it and a question for it.

    Attributes:
        entity: who or what it is about.
        attribute: what of the entity is told, as the statement calls it.
        asked: the same as the question calls it.
        value: what is asked for.
        statement: the text to hide, without space around it.
        own_line: whether the statement has to stand on lines of its own.
        question: the text that asks, ending right before the answer.
        question_own_line: whether the question has to begin a line.
        answer: the continuation: the value, after a space where there is one, and what ends it.
        entity_kind, key_kind, statement_kind, question_kind: names of the kinds.
        wording: the form of the statement, with places for entity, attribute and value.
    """

    entity: str
    attribute: str
    asked: str
    value: str
    statement: str
    own_line: bool
    question: str
    question_own_line: bool
    answer: str
    entity_kind: str
    key_kind: str
    statement_kind: str
    question_kind: str
    wording: str


def draw_fact(
    rng: np.random.Generator,
    split: str,
    *,
    entity_kind: str | None = None,
    key_kind: str | None = None,
    statement_kind: str | None = None,
    question_kind: str | None = None,
    paraphrase: bool = False,
) -> Fact:
    """One fact of a split; each kind is drawn from the split's if it is not given.

    Args:
        entity_kind: one of `entities.entity_kinds(split)`.
        key_kind: one of `keys.key_kinds(split)` or of training's.
        statement_kind, question_kind: one of `forms.statement_kinds(split)`, `question_kinds`.
        paraphrase: the question calls the attribute by another of its names.

    Raises:
        ValueError: an unknown split or kind, or a kind held out for another split.
    """
    (fact,) = draw_facts(
        rng,
        split,
        1,
        entity_kind=entity_kind,
        key_kind=key_kind,
        statement_kind=statement_kind,
        question_kind=question_kind,
        paraphrase=paraphrase,
    )
    return fact


def draw_facts(
    rng: np.random.Generator,
    split: str,
    count: int,
    *,
    alike: bool = False,
    facts_per_entity: int = 1,
    entity_kind: str | None = None,
    key_kind: str | None = None,
    statement_kind: str | None = None,
    question_kind: str | None = None,
    paraphrase: bool = False,
    avoid: Collection[str] = (),
    key_families: Collection[str] = KEY_FAMILIES,
    forms: Collection[str] = (),
) -> list[Fact]:
    """Several facts with different values, whose entities are not part of each other.

    Args:
        alike: all facts have the first one's attributes, kinds and wording, so that nothing but
            the entity tells them apart.
        facts_per_entity: how many facts each entity has, each with an attribute of its own.
        paraphrase: questions call the attribute by another of its names.
        avoid: entities of other facts in the same text, in lower case.
        key_families: families of the keys, where no kind is given.
        forms: kinds of statements and questions, where none is given; all of the split's if empty.

    Raises:
        ValueError: an unknown split or kind, a kind held out for another split, or more facts per
            entity than there are attributes.
    """
    check_split(split)
    attributes = _draw_attributes(rng, split, facts_per_entity)
    facts: list[Fact] = []
    entity, kind_of_entity, wording = "", entity_kind, None
    taken = set(avoid)
    for index in range(count):
        nth = index % facts_per_entity
        if not nth:
            entity, kind = _draw_new_entity(rng, split, kind_of_entity, taken)
            taken.add(entity.casefold())
            if alike:
                kind_of_entity = kind
            elif index:
                attributes = _draw_attributes(rng, split, facts_per_entity)
        stated, asked = _wordings(rng, attributes[nth], paraphrase, alike)
        key = draw_key(rng, split, key_kind, key_families)
        while any(key.text == fact.value for fact in facts):
            key = draw_key(rng, split, key_kind, key_families)
        statement = draw_statement(
            rng,
            split,
            entity,
            stated,
            key.text,
            kind=statement_kind,
            forms=forms,
            wording=wording,
            names_attribute=facts_per_entity > 1,
        )
        question = draw_question(
            rng,
            split,
            entity,
            asked,
            kind=question_kind,
            forms=forms,
            not_wording=statement.wording,
            names_attribute=facts_per_entity > 1,
        )
        if alike:
            key_kind, statement_kind, wording = key.kind, statement.kind, statement.wording
        facts.append(
            Fact(
                entity=entity,
                attribute=stated,
                asked=asked,
                value=key.text,
                statement=statement.text,
                own_line=statement.own_line,
                question=question.text,
                question_own_line=question.own_line,
                answer=f"{question.gap}{key.text}{question.end}",
                entity_kind=kind,
                key_kind=key.kind,
                statement_kind=statement.kind,
                question_kind=question.kind,
                wording=statement.wording,
            )
        )
    return facts


def draw_nonliteral_fact(
    rng: np.random.Generator, split: str, *, pairs_of: str | None = None
) -> Fact:
    """A fact whose question shares no content word with its statement; the answer is a name.

    Args:
        split: of the name and of the lead.
        pairs_of: the split of the needle and its question; `split` if not given. Training's pairs
            with names of another split ask whether what was learnt is applied to new names.

    Raises:
        ValueError: an unknown split.
    """
    for given in (split, pairs_of or split):
        check_split(given)
    name, kind = draw_entity(rng, split, "first-name")
    needle, request = pick(rng, ASSOCIATIONS[pairs_of or split])
    return Fact(
        entity=name,
        attribute=request,
        asked=request,
        value=name,
        statement=needle.replace("{e}", name),
        own_line=False,
        question=f"{request} {pick(rng, LEADS[split])}",
        question_own_line=False,
        answer=f" {name}.",
        entity_kind=kind,
        key_kind="first-name",
        statement_kind=SENTENCE,
        question_kind="nonliteral",
        wording=needle,
    )


def _draw_attributes(rng: np.random.Generator, split: str, count: int) -> list[Attribute]:
    attributes: list[Attribute] = []
    for _ in range(_MOST_DRAWS):
        attribute = draw_attribute(rng, split)
        if attribute not in attributes:
            attributes.append(attribute)
        if len(attributes) == count:
            return attributes
    raise ValueError(f"facts_per_entity={count}: split={split!r} has fewer attributes")


def _draw_new_entity(
    rng: np.random.Generator, split: str, kind: str | None, taken: Collection[str]
) -> tuple[str, str]:
    """An entity that neither contains one that is taken nor is contained in one."""
    for _ in range(_MOST_DRAWS):
        entity, drawn = draw_entity(rng, split, kind)
        folded = entity.casefold()
        if not any(folded in other or other in folded for other in taken):
            return entity, drawn
    raise ValueError(
        f"split={split!r} has no {len(taken) + 1} entities of kind {kind or drawn!r}: "
        "ask for fewer facts or for another kind"
    )


def _wordings(
    rng: np.random.Generator, attribute: Attribute, paraphrase: bool, plainest: bool
) -> tuple[str, str]:
    """What the statement and the question call the attribute."""
    stated = attribute.wordings[0] if plainest else pick(rng, attribute.wordings)
    if not paraphrase or len(attribute.wordings) == 1:
        return stated, stated
    return stated, pick(rng, [wording for wording in attribute.wordings if wording != stated])
