"""Needles in text: where they stand, what is asked, what is right, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ic.datamodules.facts.associations import FUNCTION_WORDS
from ic.datamodules.facts.attributes import ATTRIBUTES
from ic.datamodules.facts.keys import key_kinds
from ic.evaluation.answered import read_samples
from ic.evaluation.niah.grid import NON_LITERAL, TASKS, Cell, Config
from ic.evaluation.niah.haystack import Haystack
from ic.evaluation.niah.prompts import parts_of
from ic.evaluation.niah.scoring import normalise, share_of_values
from ic.evaluation.niah.suite import build
from ic.evaluation.options import CONTROL
from ic.evaluation.runner import run_suite, settings_hash
from ic.evaluation.suite import Sample
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.made_up_books import suite_of, write_books
from tests.evaluation.oracle import OneByOne
from tests.evaluation.small_bpe import small_bpe

BYTES = ByteTokenizer()
TOKENIZERS = {"bytes": BYTES, "bpe": small_bpe()}


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("haystack") / "books"
    write_books(folder)
    return folder


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


@pytest.mark.parametrize(
    ("text", "value", "right", "at_once"),
    [
        (" 4711.", "4711", True, True),
        (' "4711", he said', "4711", True, True),
        (" 47112", "4711", False, False),
        (" 4711-2", "4711", False, False),
        (" 4711.5", "4711", False, False),
        (" 4711 - and more", "4711", True, True),
        (" it is 4711.", "4711", True, False),
        (" it is 34711, or 3-4711", "4711", False, False),
        (" the answer is W. O. Bianchi.", "W. O. Bianchi", True, False),
        (" the string for Bianchi is UU11-CX32", "UU11-CX32-AB12", False, False),
        ("\nAmber  Falcon Tree.", "amber falcon tree", True, True),
        (" amber falcon", "amber falcon tree", False, False),
        (" $1,234.50.", "$1,234.50", True, True),
        (" DEADBEEF", "deadbeef", True, True),
        (" 7.", "7", True, True),
        ("", "4711", False, False),
    ],
)
@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_a_right_answer_holds_the_value_as_a_whole(
    prompt: str, text: str, value: str, right: bool, at_once: bool
) -> None:
    sample = Sample(np.empty(0, dtype=np.int64), {"values": [value], "other_values": []}, 9)
    score = suite_of(None, prompt=prompt).score(sample, text)
    assert (score.correct, score.measured["at_once"]) == (right, at_once)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" it is 4711. The code of Ben is 22-22.", True),
        (" 22-22. The code of Ann is 4711.", False),
        (" 22-223, or 4711.", True),
        (" the code of Ben is 22-22", False),
    ],
)
def test_a_list_of_what_all_needles_hold_is_not_right(text: str, right: bool) -> None:
    expected = {"values": ["4711"], "other_values": ["9", "22-22"]}
    score = suite_of(None).score(Sample(np.empty(0, dtype=np.int64), expected, 9), text)
    assert score.correct is right
    assert set(score.measured) == {"at_once"}


def test_what_the_distractors_hold_is_kept_for_the_score(books: Path) -> None:
    tokenizer = TOKENIZERS["bytes"]
    suite = suite_of(
        books, tasks=["multi_key", "own_words"], lengths=[1024], samples=2, repeat=True
    )
    others = {"multi_key": 4, "own_words": 0}
    for cell in suite.cells():
        sample = suite.sample(tokenizer, cell, 0)
        values = sample.expected["other_values"]
        assert len(set(values) - set(sample.expected["values"])) == others[cell.task]
        assert all(value in tokenizer.decode(sample.ids.tolist()) for value in values)


def test_values_count_one_by_one() -> None:
    values = ["34", "12", "78", "5"]
    assert share_of_values(" 12, 34 and 56.", values) == 0.5
    sample = Sample(np.empty(0, dtype=np.int64), {"values": values, "other_values": []}, 9)
    score = suite_of(None).score(sample, " 12, 34 and 56.")
    assert (score.correct, score.measured["at_once"]) == (0.5, True)
    assert normalise(" “①  ﬁne End!”\n") == "1 fine end"


class Decoder(OneByOne):
    """Reads a prompt and says in a sentence what it knows, if the text holds it; or nothing."""

    def __init__(self, tokenizer: Any, known: dict[bytes, Sample], silent: bool) -> None:
        self.tokenizer, self.known, self.silent = tokenizer, known, silent

    def answers(self, ids_BT: torch.Tensor, new_tokens: int, ended: Any = None) -> torch.Tensor:
        rows = []
        for ids in ids_BT.numpy():
            expected = self.known[ids.tobytes()].expected["values"]
            text = self.tokenizer.decode(ids.tolist())
            found = [value for value in expected if value in text and not self.silent]
            said = f" the answer is {', '.join(found)}."
            answer = self.tokenizer(said, add_special_tokens=False)["input_ids"]
            rows.append((answer + answer[-1:] * new_tokens)[:new_tokens])
        return torch.tensor(rows)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_an_oracle_scores_100_and_silence_0(kind: str, prompt: str, books: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    options = {"tasks": list(TASKS), "lengths": [1024, 2048], "samples": 7, "prompt": prompt}
    suite = suite_of(books, **options, repeat=True)
    for cell in suite.cells():
        samples = [suite.sample(tokenizer, cell, index) for index in range(cell.samples)]
        known = {sample.ids.tobytes(): sample for sample in samples}
        for silent in (False, True):
            decoder: Any = Decoder(tokenizer, known, silent)
            scores = suite.answer(decoder, tokenizer, samples)
            right = float(not silent and cell.depth != CONTROL)
            assert [score.correct for score in scores] == [right] * cell.samples, cell


@pytest.mark.slow
def test_another_process_makes_the_same_samples(books: Path) -> None:
    code = (
        "import hashlib, sys; from ic.evaluation.niah.suite import build; "
        "from ic.evaluation.niah.grid import Config; "
        "from ic.model.byte_tokenizer import ByteTokenizer; "
        "suite = build(Config(haystack=sys.argv[1], lengths=[1024], samples=9)); "
        "ids = [suite.sample(ByteTokenizer(), cell, 0).ids.tobytes() for cell in suite.cells()]; "
        "print(hashlib.sha256(b''.join(ids)).hexdigest())"
    )
    suite = build(Config(haystack=str(books), lengths=[1024], samples=9))
    ids = [suite.sample(BYTES, cell, 0).ids.tobytes() for cell in suite.cells()]
    done = subprocess.run(
        [sys.executable, "-c", code, str(books)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(b"".join(ids)).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"forms": "validation"},
        {"seed": 1},
        {"num_needles": 5},
        {"prompt": "chat"},
        {"records": ["json"]},
        {"kinds": ["hex-8"]},
        {"haystack": None},
    ],
)
def test_samples_of_other_settings_are_not_reused(changes: dict[str, Any], books: Path) -> None:
    base = {"haystack": str(books), "lengths": [512]}
    same = build(Config(**base, samples=3, control_samples=0, tasks=["own_words"]))
    assert settings_hash(build(Config(**base))) == settings_hash(same)
    assert settings_hash(build(Config(**{**base, **changes}))) != settings_hash(same)


def test_answers_by_an_earlier_rule_are_not_reused(
    make_model: Callable[..., MLAForCausalLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain answers once had to begin with the value, and were cut behind three tokens more."""
    options = {"lengths": [256], "tasks": ["own_words"], "depths": [0.5], "samples": 2}
    suite, model = suite_of(None, **options, control_samples=0), make_model(vocab_size=320)
    file, today = tmp_path / "samples.jsonl", suite.settings()
    for gone in ("right", "spare_tokens"):
        earlier = {name: value for name, value in today.items() if name != gone}
        monkeypatch.setattr(suite, "settings", lambda earlier=earlier: earlier)
        run_suite(model, BYTES, suite, file)
    monkeypatch.undo()
    before: list[bool] = []
    for _ in range(2):
        run_suite(model, BYTES, suite, file, lambda cell, row, known: before.append(known))
    assert before == [False, False, True, True]
    assert [row["settings"] for row in read_samples(file)[-2:]] == [settings_hash(suite)] * 2


def test_another_text_is_another_setting(books: Path, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    one = settings_hash(suite_of(books))
    assert settings_hash(suite_of(tmp_path / "books")) == one
    (tmp_path / "books/0.txt").write_text("Another book. It is short.")
    assert settings_hash(suite_of(tmp_path / "books")) != one


def test_formats_and_compressions_of_haystacks(books: Path, tmp_path: Path) -> None:
    texts = [file.read_text() for file in sorted(books.iterdir())]
    rows = [json.dumps(texts[0]), *(json.dumps({"text": text}) for text in texts[1:])]
    (tmp_path / "books.jsonl.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    read = build(Config(haystack=str(tmp_path / "books.jsonl.xz"))).haystack.documents
    assert read == [text.strip() for text in texts] == suite_of(books).haystack.documents


def test_what_is_shown(books: Path, figures: list[Figure], tmp_path: Path) -> None:
    suite = suite_of(books, tasks=["own_words", "records"], samples=10)
    cells = []
    for cell in suite.cells():
        right = cell.depth in (0.0, 1.0)
        samples = [suite.sample(BYTES, cell, index) for index in range(cell.samples)]
        answers = [
            vars(suite.score(each, each.expected["values"][0] if right else "")) for each in samples
        ]
        n = len(samples)
        cells.append({**vars(cell), "n": n, "correct": n * right, "answers": answers})
    rows = suite.rows(cells)
    by_task = {(row["task"], row["depth"]): (row["correct"], row["n"]) for row in rows}
    assert by_task["own_words", 0.0] == (2, 2)
    assert by_task["records", "control"] == (0, 2)
    counted = suite.counted(rows)
    assert sum(row["n"] for row in counted) == 20
    assert {row["task"] for row in counted} == {"own_words", "records"}
    of_kinds = [
        row for row in rows if row["task"].startswith("with ") and row["depth"] != "control"
    ]
    assert sum(row["n"] for row in of_kinds) == 20
    assert {row["task"] for row in of_kinds} <= {f"with {kind}" for kind in key_kinds("test")}
    assert suite.published(rows)[1] == suite.published(cells)[1]
    assert suite.published(rows)[0][2] == "right answers"
    assert str(suite.table(rows).caption).startswith("acc. %: right answers per cent")
    assert suite.published(rows)[1][0][:3] == ["own_words", "1,024", "4/10"]
    # A kind of key that controls alone have is in no line of the tables.
    alone = {**rows[0], "task": "with dates", "depth": "control"}
    assert suite.published([*rows, alone])[1] == suite.published(rows)[1]
    suite.draw(rows, tmp_path / "heatmap.png", title=suite.title)
    titles = [axis.get_title(loc="left") for axis in figures[0].axes[::2][:2]]
    assert titles == ["own_words", "records"]
    assert "exact" not in f"{figures[0].get_supxlabel()} {figures[0].axes[-1].get_ylabel()}"
    assert figures[0].axes[-1].get_ylabel() == "right answers in per cent"
    assert suite.title == "needles in real text, test forms"
    assert suite_of(None).title == "needles in synthetic noise, test forms"


def test_command(
    books: Path,
    ic: Callable[..., int],
    make_model: Callable[..., MLAForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model(vocab_size=320).save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    given = {
        "haystack": books,
        "lengths": "[512]",
        "tasks": "[own_words,records]",
        "num_needles": 1,
        "samples": 5,
        "control_samples": 1,
        "records": "[json]",
    }
    options = [f"suite.niah.{name}={value}" for name, value in given.items()]
    asked = ("evaluate", "checkpoint=model", "suite=niah", "accelerator=cpu", "output=out")
    assert ic(*asked, *options) == 0
    assert "needles in real text, test forms, greedy decoding" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert sum(row["n"] for row in rows if row["task"] in ("own_words", "records")) == 2 * 6
    samples = read_samples(tmp_path / "out")
    assert len(samples) == 12
    for row in samples:
        assert set(row["measured"]) == {"kind", "needle", "question", "at_once"}
        assert row["expected"][0] in row["measured"]["needle"]
    assert (tmp_path / "out/heatmap.png").is_file()
    assert ic(*asked, *options[1:], "suite.niah.haystack=nowhere") == 2
    assert "suite.niah.haystack: there is no file 'nowhere'" in capsys.readouterr().err
