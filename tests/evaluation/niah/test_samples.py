"""Needles in text: where they stand and what is asked."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ic.datamodules.facts.associations import FUNCTION_WORDS
from ic.datamodules.facts.attributes import ATTRIBUTES
from ic.datamodules.facts.keys import key_kinds
from ic.evaluation.niah.grid import NON_LITERAL, TASKS, Cell, Config
from ic.evaluation.niah.haystack import Haystack
from ic.evaluation.niah.prompts import parts_of
from ic.evaluation.niah.suite import build
from ic.evaluation.options import CONTROL
from ic.evaluation.suite import Sample
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.made_up_books import suite_of
from tests.evaluation.small_bpe import small_bpe

BYTES = ByteTokenizer()
TOKENIZERS = {"bytes": BYTES, "bpe": small_bpe()}


def text_of(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode(sample.ids.tolist(), skip_special_tokens=False))


def place_of(piece: np.ndarray, ids: np.ndarray) -> int:
    """Where a piece stands, once, in token ids."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(piece))
    (place,) = np.flatnonzero((windows == piece).all(axis=1))
    return int(place)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_length_depth_and_sentence_ends_are_exact(
    kind: str, task: str, prompt: str, books: Path
) -> None:
    tokenizer = TOKENIZERS[kind]
    suite = suite_of(books, tasks=[task], prompt=prompt, repeat=True)
    texts = [(books / f"{number}.txt").read_text() for number in range(3)]
    joined = ["\n\n".join(order * 2) for order in itertools.permutations(texts)]
    for cell in suite.cells():
        sample = suite.sample(tokenizer, cell, 0)
        parts = parts_of(tokenizer, suite.options, cell, 0)
        assert len(sample.ids) + sample.new_tokens == cell.length_tokens == 1024
        first, last = len(parts.frame.before), len(sample.ids) - len(parts.frame.after)
        assert sample.ids[:first].tolist() == parts.frame.before.tolist()
        assert sample.ids[last:].tolist() == parts.frame.after.tolist()
        assert parts.needles.question in tokenizer.decode(sample.ids[last:].tolist())
        ids = sample.ids[first:last]
        found = sorted((place_of(piece, ids), n) for n, piece in enumerate(parts.pieces))
        places: dict[int, int] = {}
        for place, number in reversed(found):
            ids = np.delete(ids, np.s_[place : place + len(parts.pieces[number])])
        for place, number in found:
            places[number] = place - sum(
                len(parts.pieces[other]) for before, other in found if before < place
            )
        text = tokenizer.decode(ids.tolist())
        assert any(text[5:] in each for each in joined)  # nothing else, and in its order
        for place in places.values():
            before, after = (tokenizer.decode(part.tolist()) for part in (ids[:place], ids[place:]))
            assert not before.strip() or re.search(r"(!”|(?<!Mr)\.|\?)$", before), before[-40:]
            assert after == "" or after[0].isspace()
        assert re.search(r"(!”|(?<!Mr)\.|\?)$", text)
        if cell.depth == CONTROL:
            assert parts.needles.needle.inserted not in tokenizer.decode(sample.ids.tolist())
            assert not any(
                value in tokenizer.decode(sample.ids.tolist()) for value in parts.needles.values
            )
        else:  # no further than half of the longest sentence, or all of it where the text begins
            longest = 70
            assert abs(places[0] - cell.depth * len(ids)) <= longest / (2 if cell.depth else 1)


def test_samples_by_hand(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One is here. Two is there. Three is nowhere. " * 8)
    options = {"lengths": [256], "depths": [0.5], "samples": 1, "kinds": ["digits-7"]}
    suite = suite_of(tmp_path, tasks=["own_words"], seed=3, **options)
    sample = suite.sample(BYTES, Cell("own_words", 256, 0.5, 1), 0)
    text = text_of(BYTES, sample)
    (value,) = sample.expected["values"]
    assert re.fullmatch(r"\d{7}", value)
    assert sample.expected["kind"] == "digits-7"
    body, _, question = text.rpartition("\n\n")
    # The needle is the question, the value and what ends it, in the middle of the text.
    stated = f" {question} {value}."
    assert body.count(stated) == 1
    before, _, after = body.partition(stated)
    assert before.endswith(("here.", "there.", "nowhere."))
    assert after.endswith(("here.", "there.", "nowhere."))
    assert sample.new_tokens == len(f" {value}.") + 24
    assert len(text) == 256 - sample.new_tokens


def test_no_needle_goes_into_a_token() -> None:
    """The second sentence ends within the token `. Th`, so nothing can be put behind it."""
    pieces = ["One.", " Two", ". Th", "ree."]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(pieces, range(4), strict=True))))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".{4}"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids, places = Haystack(["One. Two. Three."], repeat=False).tokens(fast, 0)
    assert (ids.tolist(), places.tolist()) == ([0, 1, 2, 3], [1, 4])


def test_the_beginning_is_no_torn_character(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("“Größe — é日本語ü!” " * 200)
    suite = suite_of(tmp_path, tasks=["own_words"], depths=[1.0], samples=40, repeat=True)
    for tokenizer in TOKENIZERS.values():
        for index in range(40):
            sample = suite.sample(tokenizer, Cell("own_words", 512, 1.0, 40), index)
            assert "\ufffd" not in text_of(tokenizer, sample)
            assert len(sample.ids) + sample.new_tokens == 512


@pytest.mark.parametrize("forms", ["train", "validation", "test"])
def test_non_literal_questions_share_no_word_of_content(forms: str) -> None:
    suite = suite_of(None, forms=forms, tasks=[NON_LITERAL])
    stop_words = set(FUNCTION_WORDS.split())
    seen = set()
    for index in range(60):
        cell = Cell(NON_LITERAL, 1024, 0.0, 60)
        needles = parts_of(BYTES, suite.options, cell, index).needles
        stated, asked = (
            set(re.findall(r"[a-z]+", text.lower())) - stop_words
            for text in (needles.needle.text, needles.question)
        )
        assert stated
        assert not stated & asked
        assert needles.values[0] in needles.needle.text
        seen.add(needles.question)
    assert len(seen) >= 6


@pytest.mark.parametrize("task", ["other_words", "multi_key", "records", "paraphrase"])
def test_other_words_are_other_words(task: str) -> None:
    suite = suite_of(None, tasks=[task])
    for cell in suite.cells():
        for index in range(cell.samples):
            needles = parts_of(BYTES, suite.options, cell, index).needles
            stated, asked = needles.needle.text, needles.question
            assert needles.values[0] in stated
            before = stated.partition(needles.values[0])[0].strip()
            assert not before or before[-30:] not in asked
            assert needles.values[0] not in asked


@pytest.mark.parametrize("index", range(5))
def test_tasks_hide_what_they_say(index: int) -> None:
    def drawn(task: str) -> tuple[list[str], str]:
        options = Config(tasks=[task])
        needles = parts_of(BYTES, options, Cell(task, 4096, 0.5, 5), index).needles
        return [each.text for each in (needles.needle, *needles.others)], needles.question

    def attributes(text: str) -> set[tuple[int, str]]:
        known = enumerate(ATTRIBUTES["test"])
        return {(n, name) for n, each in known for name in each.wordings if name in text}

    stated, asked = drawn("multi_key")
    (own,) = {frozenset(attributes(text)) for text in stated}  # one attribute, and it is asked for
    assert own & attributes(asked)
    stated, asked = drawn("multi_attribute")
    told = [frozenset(n for n, _ in attributes(text)) for text in stated]
    assert len(set(told)) == len(told) == 5
    (text,), asked = drawn("paraphrase")
    ours, theirs = attributes(text), attributes(asked)
    assert {n for n, _ in ours} & {n for n, _ in theirs}
    assert not ours & theirs


@pytest.mark.parametrize(
    ("given", "needle", "value"),
    [
        ({"tasks": ["own_words"]}, r".+ \S+\.", r".+"),
        ({"tasks": ["other_words"]}, r".+", r".+"),
        ({"tasks": ["other_words"], "haystack": None}, r".+", r".+"),
        ({"tasks": ["own_words"], "kinds": ["digits-7"]}, r".*\d{7}.*", r"\d{7}"),
        ({"tasks": ["own_words"], "kinds": ["hex-8"]}, r".*[0-9a-f]{8}.*", r"[0-9a-f]{8}"),
        ({"tasks": ["own_words"], "kinds": ["words-3"]}, r".+", r"[a-z]+ [a-z]+ [a-z]+"),
        ({"tasks": ["records"], "records": ["json"]}, r"[\[{].*[\]}]", r".+"),
    ],
)
def test_what_was_found_to_fail_can_be_asked(
    given: dict[str, Any], needle: str, value: str, books: Path
) -> None:
    """The table of the feasibility run: prose or noise, kinds of keys, JSON lines."""
    suite = build(Config(**{"haystack": str(books), "lengths": [2048], "samples": 5, **given}))
    for cell in suite.cells():
        parts = parts_of(BYTES, suite.options, cell, 0)
        assert re.fullmatch(needle, parts.needles.needle.text, re.S)
        assert re.fullmatch(value, parts.needles.values[0])
        if "records" in given:
            json.loads(parts.needles.needle.text)
            assert len(parts.pieces) == (4 if cell.depth == CONTROL else 5)
            assert parts.needles.needle.own_line


def test_tests_ask_for_nothing_of_training() -> None:
    suite = suite_of(None, samples=35, tasks=["other_words"])
    for asked, split in ((suite, "test"), (suite.cheap([512], 35), "validation")):
        kinds = {
            parts_of(BYTES, asked.options, cell, index).kind
            for cell in asked.cells()
            for index in range(cell.samples)
        }
        assert kinds == set(key_kinds(split))
        others = {"train", "validation", "test"} - {split}
        assert not kinds & {kind for other in others for kind in key_kinds(other)}


def test_samples_go_round_depths_and_kinds() -> None:
    kinds = ["hex-8", "digits-7", "words-3"]
    config = Config(samples=12, control_samples=3, lengths=[512], tasks=["own_words"], kinds=kinds)
    cells = list(config.cells())
    assert [cell.samples for cell in cells] == [3, 3, 2, 2, 2, 3]
    assert [cell.depth for cell in cells] == [*config.depths, CONTROL]
    drawn = [config.kind_of(kinds, cell, i) for cell in cells[:-1] for i in range(cell.samples)]
    assert sorted(drawn.count(kind) for kind in kinds) == [4, 4, 4]
    for count in (5, 10, 7):  # as many kinds as depths, a multiple, and neither
        many = [str(number) for number in range(count)]
        pairs = {
            (many.index(config.kind_of(many, cell, index)), cell.depth)
            for cell in cells[:-1]
            for index in range(count)
        }
        assert len(pairs) == 5 * count
        seen = [config.kind_of(many, cell, index) for index in (0, 1) for cell in cells[:-1]]
        assert set(seen) == set(many)
    few = Config(samples=3, control_samples=0, lengths=[512], tasks=["own_words"], kinds=kinds)
    assert [few.kind_of(kinds, cell, 0) for cell in few.cells()] == kinds
