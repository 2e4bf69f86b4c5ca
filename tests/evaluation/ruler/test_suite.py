"""RULER as a suite: a perfect and a silent model, lengths, what is refused, what is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ic.datamodules.make_tokenizer_options import MakeTokenizerOptions
from ic.datamodules.train_tokenizer import open_corpus, train_tokenizer
from ic.evaluation.options import TaskCell
from ic.evaluation.ruler.grid import TASKS, Config
from ic.evaluation.ruler.prompts import PromptMaker
from ic.evaluation.ruler.suite import RulerSuite
from ic.evaluation.ruler.texts import Texts
from ic.evaluation.suite import Row
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.ruler.solver import Silent, Solver

LENGTHS = [2304, 8192]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    file = tmp_path_factory.mktemp("bpe") / "text.txt"
    file.write_text("The grass is green. One of the special magic numbers for it is: 12345.\n" * 3)
    options = MakeTokenizerOptions(files=[str(file)], output=str(file.parent / "x"), vocab_size=340)
    return train_tokenizer(options, open_corpus(options))


def _tokenizer(name: str, request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = ByteTokenizer()
    return found if name == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("name", "prompt"), [("bytes", "plain"), ("bpe", "chat")])
def test_a_reader_scores_all_and_silence_nothing(
    task: str, name: str, prompt: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = _tokenizer(name, request)
    suite = RulerSuite(Config(tasks=[task], lengths=LENGTHS, samples=2, prompt=prompt))
    suite.check(tokenizer, max(LENGTHS))
    for cell in suite.cells():
        samples = [suite.sample(tokenizer, cell, index) for index in range(2)]
        solver = Solver(tokenizer)
        scores = suite.answer(solver, tokenizer, samples)
        assert [score.correct for score in scores] == [1, 1], scores
        assert [s.correct for s in suite.answer(Silent(tokenizer), tokenizer, samples)] == [0, 0]
        for sample in samples:  # no room for one more unit, the longest of which is a paragraph
            assert 0 <= cell.length_tokens - len(sample.ids) - sample.new_tokens < 500
        again = RulerSuite(suite.options).sample(tokenizer, cell, 1)
        assert np.array_equal(again.ids, samples[1].ids)
        assert not np.array_equal(samples[0].ids, samples[1].ids)


@pytest.mark.parametrize(
    "task", ["niah_single_1", "niah_multikey_3", "niah_multiquery", "vt", "fwe"]
)
def test_few_more_units_would_not_fit(task: str, bpe: PreTrainedTokenizerBase) -> None:
    config = Config()
    cell = TaskCell(task, 4096, 1)
    maker = PromptMaker(config, Texts(config), bpe)
    made = maker.longest(cell, 0)
    units = maker._guesses[task, 4096]
    assert made.tokens <= 4096
    assert 4096 - made.tokens < maker.make(cell, 0, units + 8).tokens - made.tokens
    assert np.array_equal(maker.make(cell, 0, units).ids, made.ids)


def test_tokens_are_those_of_the_whole_text(bpe: PreTrainedTokenizerBase) -> None:
    suite = RulerSuite(Config())
    made = suite.prompt(bpe, TaskCell("niah_single_2", 1024, 1), 0)
    text = made.prompt.text + made.prompt.answer_prefix
    assert made.ids.tolist() == bpe(text)["input_ids"]
    chat = RulerSuite(Config(prompt="chat")).prompt(bpe, TaskCell("niah_single_2", 1024, 1), 0)
    assert str(bpe.decode(chat.ids)) == (
        f"<|user|>{chat.prompt.text}<|end|><|assistant|>{chat.prompt.answer_prefix}"
    )


def test_a_right_answer_has_room_in_bytes() -> None:
    suite, tokenizer = RulerSuite(Config()), ByteTokenizer()
    made = suite.prompt(tokenizer, TaskCell("cwe", 2304, 1), 1)
    assert made.new_tokens == max(120, len(made.prompt.answer))
    assert suite.prompt(tokenizer, TaskCell("niah_single_1", 2304, 1), 0).new_tokens == 128


def test_lengths_in_turn_do_not_matter(bpe: PreTrainedTokenizerBase) -> None:
    cell = TaskCell("niah_multikey_1", 2048, 4)
    forward, backward = RulerSuite(Config()), RulerSuite(Config())
    ids = [forward.sample(bpe, cell, index).ids for index in range(4)]
    for index in reversed(range(4)):
        assert np.array_equal(backward.sample(bpe, cell, index).ids, ids[index])
    other = RulerSuite(Config(seed=1)).sample(bpe, cell, 0)
    assert not np.array_equal(other.ids, ids[0])


def _rows(scores: dict[str, list[float]]) -> list[Row]:
    lengths = [4096, 8192]
    return [
        {"task": task, "length_tokens": lengths[at], "samples": 10, "n": 10, "correct": 10 * share}
        for task, shares in scores.items()
        for at, share in enumerate(shares)
    ]


def test_what_is_shown(tmp_path: Path) -> None:
    suite = RulerSuite(Config(lengths=[4096, 8192], haystack="my/books", samples=10))
    rows = suite.rows(_rows({task: [1.0, 0.8] for task in TASKS}))
    *of_tasks, summary = rows
    assert [row["text"] for row in of_tasks[:4]] == [None, None, "books", "books"]
    assert of_tasks[-1]["text"] == "shipped"
    assert summary["length_tokens"] == 4096
    assert summary["means"] == {"4096": 1.0, "8192": pytest.approx(0.8)}
    assert len(suite.counted(rows)) == 26
    heads, lines = suite.published(rows)
    assert heads == ["task", "tokens", "score", "95 % interval", "n", "text"]
    assert lines[0] == ["niah_single_1", "4,096", "100.0 %", "72.2-100.0 %", "10", "-"]
    assert lines[25] == ["qa_2", "8,192", "80.0 %", "49.0-94.3 %", "10", "shipped"]
    assert [line[:3] for line in lines[26:]] == [
        ["mean of 13 of 13 tasks", "4,096", "100.0 %"],
        ["mean of 13 of 13 tasks", "8,192", "80.0 %"],
        ["effective length of 13 of 13 tasks", "4k", "mean of at least 85.6 %"],
        ["weighted mean, inc / dec", "", "86.7 / 93.3 %"],
    ]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(suite.table(rows))
    text = " ".join(shown.get().split())
    assert "effective length: 4k (mean of at least 85.6)" in text
    assert "books for niah_single_2, niah_single_3, niah_multikey_1" in text
    assert "shipped for qa_1, qa_2" in text
    suite.draw(rows, tmp_path / "x.png", title="a model", trained_length=4096)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    some = suite.rows(_rows({"vt": [1.0, 0.9]}))
    assert some[-1]["task"] == "effective length, 1 of 13 tasks"


def test_settings_tell_texts_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some prose.")
    plain = RulerSuite(Config()).settings()
    assert RulerSuite(Config(tasks=["vt"], lengths=[512])).settings() == plain
    for other in ({"haystack": str(tmp_path)}, {"seed": 1}, {"prompt": "chat"}):
        assert RulerSuite(replace(Config(), **other)).settings() != plain  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"lengths": [512]},
            r"lengths: 512 tokens are too few, with those to generate, for niah_single_1 611, .* vt 1,746, ",
        ),
        ({"lengths": [99999]}, r"lengths: 99,999 tokens, but the model has 65,536 positions"),
    ],
)
def test_lengths_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RulerSuite(Config(**given)).check(ByteTokenizer(), 65536)


def test_the_least_length_is_enough() -> None:
    suite = RulerSuite(Config(tasks=["vt"], lengths=[600], samples=3))
    with pytest.raises(ValueError, match=r"for vt ([\d,]+);") as error:
        suite.check(ByteTokenizer(), 65536)
    least = int(str(error.value).split("for vt ")[1].split(";")[0].replace(",", ""))
    enough = RulerSuite(Config(tasks=["vt"], lengths=[least], samples=3))
    enough.check(ByteTokenizer(), 65536)
    for cell in enough.cells():
        assert all(enough.sample(ByteTokenizer(), cell, i) for i in range(3))
    with pytest.raises(ValueError, match=r"600 tokens cannot hold vt: sample 0 takes"):
        suite.sample(ByteTokenizer(), TaskCell("vt", 600, 1), 0)


def test_from_the_command_line(
    ic: Callable[..., int],
    make_model: Callable[..., MLAForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model(vocab_size=320).save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    asked = ("evaluate", "checkpoint=model", "suite=ruler", "accelerator=cpu", "output=out")
    few = ("suite.ruler.tasks=[fwe,qa_1]", "suite.ruler.samples=1")
    assert ic(*asked, *few, "suite.ruler.lengths=[256]") == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(
            "ic: suite.ruler.lengths: 256 tokens are too few, with those to generate, for fwe "
        )
    )
    assert ic(*asked, *few, "suite.ruler.lengths=[768]") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "effective length over 2 of 13 tasks: below 768" in said
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [(row["task"], row["accuracy"]) for row in rows[:-1]] == [("fwe", 0.0), ("qa_1", 0.0)]
    assert (rows[-1]["what"], rows[-1]["length_tokens"]) == ("effective_length", None)
    assert (tmp_path / "out/ruler.csv").read_text().count("\n") == 4


def test_tasks_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"suite\.ruler\.tasks=\['qa'\]: one or more of niah"):
        Config(tasks=["qa"])
    with pytest.raises(ValueError, match=r"suite\.ruler\.tasks"):
        Config(tasks=["vt", "vt"])
    with pytest.raises(ValueError, match=r"suite\.ruler\.lengths=\[64\]"):
        Config(lengths=[64])


def test_a_tokenizer_without_digits() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}
    model = models.BPE(vocab=letters, merges=[], unk_token="?")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="?")
    with pytest.raises(ValueError, match=r"suite=ruler: the tokenizer cannot write 0 1 2 3 4"):
        RulerSuite(Config()).check(tokenizer, 131072)
