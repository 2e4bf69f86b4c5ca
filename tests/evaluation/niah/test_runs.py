"""`suite=niah` from the command to the page: an oracle, other processes, settings that differ."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from ic.datamodules.facts.keys import key_kinds
from ic.evaluation.answered import read_samples
from ic.evaluation.niah.grid import TASKS, Config
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
