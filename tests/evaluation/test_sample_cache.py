"""Samples that are kept: read as they were drawn, drawn anew where they may differ."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ic.evaluation import sample_cache
from ic.evaluation.runner import run_suite
from ic.evaluation.sample_cache import SampleCache
from ic.evaluation.suite import Sample
from ic.files.cache_folder import cache_folder
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.copy_word.grid import Cell, Config
from tests.evaluation.copy_word.suite import CopyWord
from tests.evaluation.oracle import Copier

TOKENIZER = ByteTokenizer()
CELL = Cell(4, 32, 3)


class SlowlyDrawn(CopyWord):
    """Counts what is drawn."""

    cached = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.drawn: list[int] = []

    def sample(self, tokenizer: ByteTokenizer, cell: Cell, index: int) -> Sample:
        self.drawn.append(index)
        return super().sample(tokenizer, cell, index)


@pytest.fixture
def suite() -> SlowlyDrawn:
    return SlowlyDrawn(Config())


def same(left: Sample, right: Sample) -> bool:
    equal = left.ids.dtype == right.ids.dtype == np.int64 and np.array_equal(left.ids, right.ids)
    return equal and (left.expected, left.new_tokens) == (right.expected, right.new_tokens)


def test_a_sample_is_drawn_once(suite: SlowlyDrawn, tmp_path: Path) -> None:
    drawn = [SampleCache(tmp_path, suite, TOKENIZER).sample(CELL, index) for index in (0, 1)]
    read = [SampleCache(tmp_path, suite, TOKENIZER).sample(CELL, index) for index in (0, 1)]
    assert suite.drawn == [0, 1]
    assert all(map(same, drawn, read))
    assert all(map(same, read, [CopyWord(Config()).sample(TOKENIZER, CELL, i) for i in (0, 1)]))


def test_what_may_differ_is_drawn_anew(
    suite: SlowlyDrawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SampleCache(tmp_path, suite, TOKENIZER)
    first = cache.sample(CELL, 0)
    cache.sample(replace(CELL, length_tokens=33), 0)  # another cell
    other = ByteTokenizer()
    other.chat_template = "{{ messages }}"
    SampleCache(tmp_path, suite, other).sample(CELL, 0)
    seeded = SlowlyDrawn(Config(seed=7))
    assert not same(SampleCache(tmp_path, seeded, TOKENIZER).sample(CELL, 0), first)
    monkeypatch.setattr(sample_cache, "_code_identity", lambda: "of another version")
    SampleCache(tmp_path, suite, TOKENIZER).sample(CELL, 0)
    assert (suite.drawn, seeded.drawn) == ([0, 0, 0, 0], [0])


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", None], ids=["empty", "cut", "half"])
def test_a_damaged_file_is_drawn_anew(
    suite: SlowlyDrawn, tmp_path: Path, damage: bytes | None
) -> None:
    cache = SampleCache(tmp_path, suite, TOKENIZER)
    first = cache.sample(CELL, 0)
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert same(cache.sample(CELL, 0), first)
    assert same(cache.sample(CELL, 0), first)
    assert suite.drawn == [0, 0]
    assert file.read_bytes() == whole


def test_several_may_share_it(tmp_path: Path) -> None:
    suites = [SlowlyDrawn(Config()) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        drawn = list(
            threads.map(lambda s: SampleCache(tmp_path, s, TOKENIZER).sample(CELL, 0), suites)
        )
    assert all(same(sample, drawn[0]) for sample in drawn)
    assert len(list(tmp_path.rglob("*"))) == 3  # two folders and the file: nothing is left behind


def test_the_runner_uses_it(suite: SlowlyDrawn, make_model, tmp_path: Path) -> None:
    copier = Copier(make_model(vocab_size=320).config)
    runs = [
        run_suite(copier, TOKENIZER, suite, tmp_path / f"{n}.jsonl", sample_cache=tmp_path / "kept")
        for n in (1, 2)
    ]
    assert len(suite.drawn) == 12
    answers = [[row["answers"] for row in rows] for rows in runs]
    assert answers[0] == answers[1]


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto", "samples") == tmp_path / "infinite-context/samples"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder("auto", "samples") == Path("/home/me/.cache/infinite-context/samples")
    assert cache_folder("here", "samples") == Path("here")
    assert cache_folder(None, "samples") is None


def test_a_folder_that_cannot_be_written_to_ends_nothing(
    suite: SlowlyDrawn, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    cache = SampleCache(tmp_path / "file", suite, TOKENIZER)
    assert same(cache.sample(CELL, 0), CopyWord(Config()).sample(TOKENIZER, CELL, 0))
