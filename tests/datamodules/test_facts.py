"""Facts can be answered from their statements, in other words; held-out parts stay held out."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pytest

from ic.datamodules.facts import exercise_wordings, wordings
from ic.datamodules.facts.associations import ASSOCIATIONS, FUNCTION_WORDS
from ic.datamodules.facts.associations import LEADS as NONLITERAL_LEADS
from ic.datamodules.facts.attributes import ATTRIBUTES
from ic.datamodules.facts.composed import compose
from ic.datamodules.facts.entities import entity_kinds
from ic.datamodules.facts.exercises import Draw, draw_exercises
from ic.datamodules.facts.fact import Fact, draw_fact, draw_facts, draw_nonliteral_fact
from ic.datamodules.facts.forms import draw_question, draw_statement, statement_kinds
from ic.datamodules.facts.keys import draw_key, key_kinds
from ic.datamodules.facts.splits import split_of
from ic.datamodules.facts.structures import STRUCTURES
from ic.datamodules.facts.words import FIRST_NAMES, LAST_NAMES, english_words

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
PARTS = {
    "clauses": wordings.CLAUSES,
    "openings": wordings.OPENINGS,
    "endings": wordings.ENDINGS,
    "requests": wordings.REQUESTS,
    "leads": wordings.LEADS,
    "frames": wordings.FRAMES,
    "wrappers": wordings.WRAPPERS,
    "structures": {
        split: [form for forms in STRUCTURES.values() for form in forms.get(split, ())]
        for split in SPLITS
    },
    "attributes": {
        split: [words for attribute in ATTRIBUTES[split] for words in attribute.wordings]
        for split in SPLITS
    },
    "associations": {
        split: [text for pair in ASSOCIATIONS[split] for text in pair] for split in SPLITS
    },
    "nonliteral leads": NONLITERAL_LEADS,
    "order": {
        split: [form for forms in exercise_wordings.ORDER.values() for form in forms[split]]
        for split in SPLITS
    },
    "recall": exercise_wordings.RECALL,
    "words": english_words(),
    "first names": FIRST_NAMES,
    "last names": LAST_NAMES,
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bare(text: str) -> str:
    """Without case and space."""
    return "".join(text.casefold().split())


@pytest.mark.parametrize("part", PARTS)
def test_no_held_out_wording_is_one_of_training_in_other_case_or_spaces(part: str) -> None:
    bared = {split: {bare(text) for text in PARTS[part][split]} for split in SPLITS}
    assert min(len(texts) for texts in bared.values()) >= 2
    for split in HELD_OUT:
        for other in set(SPLITS) - {split}:
            assert not bared[split] & bared[other]


def test_training_draws_no_held_out_part() -> None:
    """Looked for in the drawn text itself: the words of each held-out form, whatever fills it."""
    facts = draw_facts(rng(), "train", 400) + draw_facts(rng(1), "train", 400, paraphrase=True)
    text = "\n".join(f"{fact.statement}\n{fact.question}\n" for fact in facts).casefold()
    found = dict.fromkeys(PARTS, 0)
    for part in (
        "clauses",
        "openings",
        "endings",
        "requests",
        "leads",
        "frames",
        "wrappers",
        "structures",
    ):
        for split in SPLITS:
            for form in PARTS[part][split]:
                pieces = re.split(r"\{[a-zA-Z]\}", form.casefold())
                pattern = "[^\n]{1,60}?".join(re.escape(piece) for piece in pieces)
                if len(re.findall("[a-z]{2,}", pattern)) < 2:
                    continue  # `{e} ~ {v}` and the like: told by their wording below
                if re.search(pattern, text):
                    assert split == "train", form
                    found[part] += 1
    assert min(found[part] for part in ("clauses", "openings", "endings", "requests")) >= 8
    allowed = set(PARTS["structures"]["train"]) | set(wordings.CLAUSES["train"])
    written = {fact.wording for fact in facts if fact.statement_kind != "composed"}
    assert written <= allowed
    assert len({fact.wording for fact in facts} - written) > 60
    assert {fact.attribute for fact in facts} <= set(PARTS["attributes"]["train"])
    assert {fact.key_kind for fact in facts} == set(key_kinds("train"))
    assert {fact.entity_kind for fact in facts} == set(entity_kinds("train"))
    assert {fact.statement_kind for fact in facts} == set(statement_kinds("train"))


def test_no_composed_form_is_one_that_is_held_out() -> None:
    held_out = {bare(form) for split in HELD_OUT for form in PARTS["structures"][split]}
    generator = rng()
    composed = {bare(compose(generator, value_last=nth % 2 == 0)) for nth in range(20_000)}
    assert len(composed) > 10_000
    assert not composed & held_out


def test_patterns_stand_for_each_choice() -> None:
    assert wordings.expand(("[a|b] {e} [|not ]{v}", "[a|c] {e} {v}")) == (
        "a {e} {v}",
        "a {e} not {v}",
        "b {e} {v}",
        "b {e} not {v}",
        "c {e} {v}",
    )


def test_kinds_are_held_out_whole() -> None:
    for kinds in (key_kinds, statement_kinds):
        only = {s: set(kinds(s)) - set(kinds("train")) for s in HELD_OUT}
        assert only["validation"]
        assert only["test"]
        assert not only["validation"] & only["test"]
    assert {"digits-7", "hex-8", "words-3"} <= set(key_kinds("test"))
    assert not set(key_kinds("test")) & set(key_kinds("train"))
    for value, kind in ((fact.value, fact.key_kind) for fact in draw_facts(rng(), "train", 500)):
        assert not re.fullmatch(
            r"\d{7}|\d{10}|[a-z]+ [a-z]+ [a-z]+" if "pseudo" not in kind else "", value
        )
        assert kind.startswith("digits") or not re.fullmatch("[0-9a-f]{8}", value)


@pytest.mark.parametrize(("kind", "characters"), [("hex-7", 16), ("mixed-6", 62)])
def test_a_code_of_training_is_neither_a_number_nor_a_word(kind: str, characters: int) -> None:
    """One in 27 hexadecimal ones of seven would be a number, which is what the test asks for."""
    generator = rng()
    keys = [draw_key(generator, "train", kind).text for _ in range(600)]
    assert not [key for key in keys if key.isdigit() or key.isalpha()]
    assert len(set("".join(keys))) == characters


@pytest.mark.parametrize("kind", ["words-2", "full-name", "digits-5", "time", "mixed-8", "email"])
def test_a_kind_of_training_comes_with_keys_of_the_split(kind: str) -> None:
    generator = rng()
    keys = {s: {draw_key(generator, s, kind).text for _ in range(150)} for s in SPLITS}
    assert not keys["test"] & keys["train"]
    assert not keys["validation"] & keys["train"]
    if kind in ("digits-5", "time", "mixed-8"):
        assert {split_of(key) for key in keys["test"]} == {"test"}
    else:
        words = {word for key in keys["test"] for word in re.findall("[A-Za-z]{3,}", key)}
        assert {split_of(word) for word in words - {"org", "com", "net"}} == {"test"}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("paraphrase", [False, True])
def test_the_statement_answers_the_question_in_other_words(split: str, paraphrase: bool) -> None:
    facts = draw_facts(rng(2), split, 150, facts_per_entity=3, paraphrase=paraphrase)
    assert len({fact.value for fact in facts}) == 150
    entities = list(dict.fromkeys(fact.entity for fact in facts))
    assert len(entities) == 50
    assert not any(a in b for a in entities for b in entities if a != b)
    renamed = 0
    for fact in facts:
        assert fact.value in fact.statement
        assert fact.entity.removeprefix("the ") in fact.statement
        assert fact.entity.removeprefix("the ") in fact.question
        assert fact.value not in fact.question.replace(fact.entity, "")
        assert fact.answer.lstrip(" ").startswith(fact.value)
        assert re.fullmatch(r" ?(\n|_|[^\w\s])", fact.answer.lstrip(" ")[len(fact.value) :])
        # The space before a value is the value's; forms with several keep the others.
        assert fact.answer.startswith(" ") or not fact.question.endswith(" ")
        assert not re.search(r"\{[a-zA-Z]\}", fact.statement + fact.question)
        assert not fact.statement.startswith(fact.question.strip())
        renamed += fact.attribute not in fact.question
    assert renamed > 60 if paraphrase else renamed < 60  # `pass_key` and `Pass key` count too
    for first in facts[::3]:
        of_entity = [fact.attribute for fact in facts if fact.entity == first.entity]
        assert len(set(of_entity)) == 3
    for fact in facts:
        assert re.search(r"\{[aAscS]\}", fact.wording)  # or nothing tells an entity's facts apart


def test_forms_filled_by_hand() -> None:
    def state(kind: str, wording: str, value: str = "482") -> str:
        texts = [
            draw_statement(
                rng(seed),
                "train",
                "the pilot Mara",
                "access code",
                value,
                kind=kind,
                wording=wording,
            ).text
            for seed in range(30)
        ]
        return min(texts, key=len)  # the one without opening and ending

    assert state("sentence", "the {a} of {e} is {v}") == "The access code of the pilot Mara is 482."
    assert (
        state("sentence", "{e} got {v} for a {a}") == "The pilot Mara got 482 for an access code."
    )
    assert (
        state("sentence", "{v} is {e}'s {a}", "amber") == "amber is the pilot Mara's access code."
    )
    assert (
        state("xml", '<item name="{e}" {s}="{v}"/>')
        == '<item name="the pilot Mara" access_code="482"/>'
    )
    assert (
        state("json", '{"name": "{e}", "{c}": "{v}"}')
        == '{"name": "the pilot Mara", "accessCode": "482"}'
    )
    assert state("shell", 'export {S}="{v}"  # {e}') == 'export ACCESS_CODE="482"  # the pilot Mara'
    json = draw_question(rng(), "validation", "Mara", "lot", kind="json")
    assert json.text == '{"record": {"who": "Mara", "what": "lot", "data": "'
    assert (json.gap, json.end, json.own_line) == ("", '"', True)
    line = draw_question(
        rng(), "validation", "Mara", "lot", kind="line", not_wording="Entry: {e}; {A}: {v}"
    )
    assert (line.text, line.gap, line.end) == ("Mara >> lot >>", " ", "\n")


def test_alike_facts_differ_in_nothing_but_entity_and_value() -> None:
    for seed in range(20):
        facts = draw_facts(rng(seed), "test", 6, alike=True)
        assert len({fact.entity for fact in facts}) == 6
        for field in ("wording", "attribute", "key_kind", "entity_kind", "statement_kind"):
            assert len({getattr(fact, field) for fact in facts}) == 1


def content_words(texts: Iterable[str]) -> set[str]:
    words = re.findall("[a-z]+", " ".join(texts).casefold())
    return {word[:4] for word in words if word not in FUNCTION_WORDS.split() and word != "e"}


@pytest.mark.parametrize("split", SPLITS)
def test_nonliteral_needles_share_no_content_word_with_their_question(split: str) -> None:
    for needle, question in ASSOCIATIONS[split]:
        assert content_words([needle])
        assert content_words([question])
        assert not content_words([needle]) & content_words([question])
    facts: list[Fact] = [draw_nonliteral_fact(rng(seed), split) for seed in range(40)]
    assert {fact.wording for fact in facts} <= {needle for needle, _ in ASSOCIATIONS[split]}
    for fact in facts:
        assert split_of(fact.value) == split
        assert fact.value in fact.statement
        assert fact.answer == f" {fact.value}."
    borrowed = draw_nonliteral_fact(rng(), split, pairs_of="train")
    assert borrowed.wording in {needle for needle, _ in ASSOCIATIONS["train"]}


def test_the_same_generator_gives_the_same_facts() -> None:
    assert draw_facts(rng(5), "train", 20) == draw_facts(rng(5), "train", 20)
    assert draw_facts(rng(5), "train", 20) != draw_facts(rng(6), "train", 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "dev"}, "split='dev': choose from train, validation, test"),
        (
            {"split": "train", "key_kind": "hex-8"},
            "key_kind='hex-8' is held out from split='train'; choose from digits-2",
        ),
        ({"split": "test", "key_kind": "digits-10"}, "held out from split='test'"),
        (
            {"split": "test", "entity_kind": "cat"},
            "entity_kind='cat' is unknown; choose from first-name",
        ),
        (
            {"split": "train", "statement_kind": "html"},
            "'train' has no such form here; choose from sentence, composed, line",
        ),
        (
            {"split": "test", "question_kind": "sql"},
            "'test' has no such form here; choose from request, sentence",
        ),
    ],
)
def test_refuses(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_fact(rng(), **given)


def test_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="facts_per_entity=99: split='test' has fewer attributes"):
        draw_facts(rng(), "test", 99, facts_per_entity=99)
    with pytest.raises(ValueError, match="entities of kind 'first-name'"):
        draw_facts(rng(), "test", 99, entity_kind="first-name")


@pytest.mark.parametrize("split", SPLITS)
def test_the_order_that_is_asked_for_is_that_of_the_text(split: str) -> None:
    drawn, places = rng(), dict.fromkeys(exercise_wordings.ORDER, 0)
    for _ in range(200):
        (exercise,) = draw_exercises("order", Draw(drawn, split))
        (query,) = exercise.queries
        name = query.answer.strip().removesuffix(".").casefold()
        named = [name in piece.text.casefold() for piece in exercise.pieces]
        assert sum(named) == 1
        forms = {
            where: form
            for where, by_split in exercise_wordings.ORDER.items()
            for form in by_split[split]
            if re.fullmatch(
                re.sub(r"\\\{[lae]\\\}", ".+", re.escape(form)) + r"[\s\S]*",
                query.question.text,
                re.IGNORECASE,
            )
        }
        (where,) = forms
        places[where] += 1
        at = named.index(True)
        pattern = re.sub(r"\\\{[la]\\\}", ".+", re.escape(forms[where]))
        other = re.match(pattern.replace(r"\{e\}", "(?P<e>.+)"), query.question.text, re.IGNORECASE)
        if where in ("first", "last"):
            assert at == (0 if where == "first" else len(named) - 1)
        else:
            (beside,) = (
                n
                for n, p in enumerate(exercise.pieces)
                if other["e"].casefold() in p.text.casefold()
            )
            assert at == beside + (-1 if where == "before" else 1)
    assert min(places.values()) > 20


def test_rulers_assignment_is_held_out() -> None:
    forms = exercise_wordings.ASSIGNMENTS
    assert ("VAR {x} = {v}", "VAR {x} = VAR {y}") in forms["test"]
    drawn = rng()
    for _ in range(300):
        exercises = draw_exercises("variables", Draw(drawn, "train"))
        assert not any(p.text.startswith("VAR ") for each in exercises for p in each.pieces)
