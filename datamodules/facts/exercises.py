"""Exercises of retrieval: texts to strew into a haystack, and questions with their answers.

Beside single facts, in the manner of RULER (arXiv 2404.06654): several values of one name, several
names at once, chains of variables and words that occur repeatedly. The questions and the ways to
assign variables are other ones than RULER's, whose assignment is one of the test set's
(`exercise_wordings.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from ic.datamodules.facts import exercise_wordings as wordings
from ic.datamodules.facts.attributes import plural
from ic.datamodules.facts.fact import Fact, draw_facts, draw_nonliteral_fact
from ic.datamodules.facts.forms import begin, draw_statement, draw_turns, fill
from ic.datamodules.facts.keys import KEY_FAMILIES, draw_key
from ic.datamodules.facts.kinds import draw_characters
from ic.datamodules.facts.recall import Recall, Sentences, draw_recall
from ic.datamodules.facts.splits import pick
from ic.datamodules.facts.words import draw_word

_PARAPHRASED = 0.3  # share of the groups of facts
_MOST_ALIKE = 8
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Piece:
    """A text to put into the haystack; `own_line`: on lines of its own."""

    text: str
    own_line: bool


@dataclass(frozen=True)
class Query:
    """A question and the continuation that answers it, or two turns of a conversation.

    Attributes:
        about: its `task`, and for a single fact the kinds in which it is `stated` and `asked`, and
            of its `key`.
    """

    question: Piece
    answer: str
    about: dict[str, str]


@dataclass(frozen=True)
class Exercise:
    """Pieces in the order of the text, and queries that follow them all, in any order."""

    task: str
    pieces: tuple[Piece, ...]
    queries: tuple[Query, ...]


@dataclass
class Draw:
    """What exercises of one text are drawn with.

    Attributes:
        sentences: the haystack, of which `recall` takes its words.
        taken: entities and variables that are in the text already, in lower case.
        recalled: what `recall` has put into the text already.
        most: how many facts, values, names or variables an exercise may have.
        key_families, forms: of the facts (`draw_facts`).
        in_turns: questions and answers are turns of a conversation.
    """

    rng: np.random.Generator
    split: str
    most: int = 8
    key_families: Collection[str] = KEY_FAMILIES
    forms: Collection[str] = ()
    in_turns: bool = False
    sentences: Sentences | None = None
    taken: set[str] = field(default_factory=set)
    recalled: list[Recall] = field(default_factory=list)

    def between(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, max(least, min(most, self.most)) + 1))

    def facts(self, count: int, *, alike: bool = False, per_entity: int = 1) -> list[Fact]:
        facts = draw_facts(
            self.rng,
            self.split,
            count,
            alike=alike,
            facts_per_entity=per_entity,
            # Only in training can one know which of several attributes another name means.
            paraphrase=self.rng.random() < _PARAPHRASED
            and (per_entity == 1 or self.split == "train"),
            avoid=self.taken,
            key_families=self.key_families,
            forms=self.forms,
        )
        self.taken.update(fact.entity.casefold() for fact in facts)
        return facts


def draw_exercises(task: str, draw: Draw) -> list[Exercise]:
    """One or several exercises of a task (one of `RETRIEVAL_TASKS`), which belong to one text."""
    return _TASKS[task](draw)


def _fact(draw: Draw) -> list[Exercise]:
    """Facts, each asked for; of several ones all but the entity is alike."""
    count = draw.between(2, _MOST_ALIKE) if draw.rng.random() < 0.3 else 1
    return [_single(draw, fact, "fact") for fact in draw.facts(count, alike=count > 1)]


def _profile(draw: Draw) -> list[Exercise]:
    """Several facts of one entity, so that the attribute decides which is asked for."""
    count = draw.between(2, 4)
    return [_single(draw, fact, "profile") for fact in draw.facts(count, per_entity=count)]


def _block(draw: Draw) -> list[Exercise]:
    """Facts that stand together, such as the lines of a table, each asked for or half of them."""
    facts = draw.facts(draw.between(2, _MOST_ALIKE), alike=True)
    lines = any(fact.own_line for fact in facts)
    text = ("\n" if lines else " ").join(fact.statement for fact in facts)
    order = draw.rng.permutation(len(facts))[: draw.between(1, len(facts))]
    queries = tuple(_query(draw, facts[int(index)], "block") for index in order)
    return [Exercise("block", (Piece(text, lines),), queries)]


def _owner(draw: Draw) -> list[Exercise]:
    """Facts alike, of which the value is told and the entity asked for."""
    facts = draw.facts(draw.between(1, 4), alike=True)
    form = pick(draw.rng, wordings.OWNERS[draw.split])
    fact = facts[0]
    question = fill(draw.rng, draw.split, form, fact.entity, fact.attribute, fact.value)
    answer = f"{fact.entity}." if draw.in_turns else f" {fact.entity}."
    query = Query(Piece(begin(form, question), False), answer, {"task": "owner"})
    return [
        Exercise("owner", _pieces([fact]), (query,)),
        *(Exercise("owner", _pieces([other]), ()) for other in facts[1:]),
    ]


def _values(draw: Draw) -> list[Exercise]:
    """Several values of one attribute, all asked for in the order of the text."""
    (fact,) = draw.facts(1)
    values, pieces = [fact.value], list(_pieces([fact]))
    for _ in range(draw.between(1, 5)):
        value = draw_key(draw.rng, draw.split, fact.key_kind).text
        if value not in values:
            values.append(value)
            stated = draw_statement(
                draw.rng,
                draw.split,
                fact.entity,
                fact.attribute,
                value,
                kind=fact.statement_kind,
                wording=fact.wording,
            )
            pieces.append(Piece(stated.text, stated.own_line))
    query = _list_query(draw, "values", wordings.VALUES, values, e=fact.entity, a=fact.attribute)
    return [Exercise("values", tuple(pieces), (query,))]


def _entities(draw: Draw) -> list[Exercise]:
    """Several entities with an attribute each, all asked for in one question."""
    facts = draw.facts(draw.between(2, 6), alike=True)
    asked = [facts[int(i)] for i in draw.rng.permutation(len(facts))[: draw.between(2, 4)]]
    query = _list_query(
        draw,
        "entities",
        wordings.ENTITIES,
        [fact.value for fact in asked],
        l=_listed([fact.entity for fact in asked]),
        a=facts[0].attribute,
    )
    return [Exercise("entities", _pieces(facts), (query,))]


def _order(draw: Draw) -> list[Exercise]:
    """Facts alike, of whose entities the first or the last in the text is asked for, or the one
    that comes before or behind another.
    """
    facts = draw.facts(draw.between(2, 5), alike=True)
    names = [fact.entity for fact in facts]
    where = pick(draw.rng, tuple(wordings.ORDER))
    left = int(draw.rng.integers(len(names) - 1))
    asked = {"first": 0, "last": len(names) - 1, "before": left, "behind": left + 1}[where]
    other = left + 1 if where == "before" else left
    listed = [names[int(index)] for index in draw.rng.permutation(len(names))]
    query = _list_query(
        draw,
        "order",
        wordings.ORDER[where],
        [names[asked]],
        wordings.NAME_LEADS,
        l=_listed(listed),
        a=facts[0].attribute,
        e=names[other],
    )
    return [Exercise("order", _pieces(facts), (query,))]


def _variables(draw: Draw) -> list[Exercise]:
    """Chains of variables; of one chain all are asked for by the value of its first."""
    length, chains = draw.between(2, 5), draw.between(1, 3)
    letters = int(draw.rng.integers(2, 6))
    first, following = pick(draw.rng, wordings.ASSIGNMENTS[draw.split])
    own_line = not first.endswith(".")
    digits = int(draw.rng.integers(3, 7))
    drawn = [draw_characters(draw.rng, "0123456789", digits) for _ in range(chains)]
    values = list(dict.fromkeys(drawn))
    exercises = []
    for nth, value in enumerate(values):
        names = [_variable(draw, letters) for _ in range(length)]
        texts = [first.replace("{v}", value), *(following.replace("{y}", n) for n in names[:-1])]
        pieces = tuple(
            Piece(text.replace("{x}", name), own_line)
            for text, name in zip(texts, names, strict=True)
        )
        asked = () if nth else (_list_query(draw, "variables", wordings.VARIABLES, names, v=value),)
        exercises.append(Exercise("variables", pieces, asked))
    return exercises


def _repeated(draw: Draw) -> list[Exercise]:
    """Lists of words of which a few occur several times."""
    times = int(draw.rng.integers(2, 5))
    words: list[str] = []
    for _ in range(draw.between(4, 40) + 2):
        word = draw_word(draw.rng, draw.split)
        if word not in words:
            words.append(word)
    common = words[: draw.between(1, 3)]
    bag = words + common * (times - 1)
    bag = [bag[int(index)] for index in draw.rng.permutation(len(bag))]
    heading = pick(draw.rng, wordings.LISTS[draw.split])
    style = int(draw.rng.integers(3))
    if style == 0:
        text = f"{heading} " + ", ".join(bag)
    elif style == 1:
        text = f"{heading} " + " ".join(f"{n}. {word}" for n, word in enumerate(bag, 1))
    else:
        text = heading + "\n" + "\n".join(bag)
    answers = sorted(common, key=bag.index)
    query = _list_query(draw, "repeated", wordings.REPEATED, answers)
    return [Exercise("repeated", (Piece(text, True),), (query,))]


def _nonliteral(draw: Draw) -> list[Exercise]:
    fact = draw_nonliteral_fact(draw.rng, draw.split)
    if fact.entity.casefold() in draw.taken or fact.wording in draw.taken:
        return []  # its question would have two answers
    draw.taken.update((fact.entity.casefold(), fact.wording))
    return [_single(draw, fact, "nonliteral")]


def _recall(draw: Draw) -> list[Exercise]:
    """A sentence of the haystack, and its words once more up to the ending that is asked for."""
    if draw.sentences is None:
        raise ValueError("the task 'recall' needs the sentences of a haystack")
    recall = draw_recall(
        draw.rng, draw.split, draw.sentences, draw.recalled, draw.key_families, draw.most
    )
    draw.recalled.append(recall)
    question, answer = recall.before, f" {recall.ending}."
    if draw.in_turns:
        question = pick(draw.rng, wordings.RECALL[draw.split]).replace("{t}", recall.before)
        answer = f"{recall.ending}."
    query = Query(Piece(question, False), answer, {"task": "recall", "key": recall.kind})
    return [Exercise("recall", (Piece(recall.text, False),), (query,))]


def _variable(draw: Draw, letters: int) -> str:
    """A name in capitals that is none of the text's so far."""
    while True:
        name = draw_characters(draw.rng, _LETTERS, letters)
        if name.casefold() not in draw.taken:
            draw.taken.add(name.casefold())
            return name


_TASKS: dict[str, Callable[[Draw], list[Exercise]]] = {
    "fact": _fact,
    "profile": _profile,
    "block": _block,
    "owner": _owner,
    "values": _values,
    "entities": _entities,
    "order": _order,
    "variables": _variables,
    "repeated": _repeated,
    "nonliteral": _nonliteral,
    "recall": _recall,
}


def _single(draw: Draw, fact: Fact, task: str) -> Exercise:
    return Exercise(task, _pieces([fact]), (_query(draw, fact, task),))


def _pieces(facts: list[Fact]) -> tuple[Piece, ...]:
    return tuple(Piece(fact.statement, fact.own_line) for fact in facts)


def _query(draw: Draw, fact: Fact, task: str) -> Query:
    about = {
        "task": task,
        "stated": fact.statement_kind,
        "asked": "turn" if draw.in_turns else fact.question_kind,
        "key": fact.key_kind,
    }
    if draw.in_turns:
        if task == "nonliteral":
            return Query(Piece(fact.asked, False), f"{fact.value}.", about)
        question, answer = draw_turns(draw.rng, draw.split, fact.entity, fact.asked, fact.value)
        return Query(Piece(question, False), answer, about)
    own_line = fact.question_own_line or "\n" in fact.question
    return Query(Piece(fact.question, own_line), fact.answer, about)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}"


def _list_query(
    draw: Draw,
    task: str,
    forms: wordings.Forms,
    answers: list[str],
    leads: wordings.Forms = wordings.LEADS,
    **filled: str,
) -> Query:
    """A question in one of the forms; the answers follow with commas between them."""
    form = text = pick(draw.rng, forms[draw.split])
    if "a" in filled:
        filled["p"] = plural(filled["a"])
    for place, words in filled.items():
        text = text.replace(f"{{{place}}}", words)
    text = begin(form, text)
    lead = pick(draw.rng, leads[draw.split])
    if draw.in_turns:
        return Query(Piece(text, False), f"{lead} {', '.join(answers)}.", {"task": task})
    newline = draw.rng.random() < 0.3
    question = f"{text}\n{lead}" if newline else f"{text} {lead}"
    return Query(Piece(question, newline), f" {', '.join(answers)}.", {"task": task})
