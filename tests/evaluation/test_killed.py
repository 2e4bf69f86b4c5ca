"""An evaluation that is killed, alone or as one of two processes, goes on where it was."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ic.evaluation import runner
from ic.evaluation.answered import read_samples, sample_key
from ic.evaluation.runner import run_suite
from ic.files.json_lines import append_row
from ic.model import MLAConfig
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.copy_word.grid import Config
from tests.evaluation.copy_word.suite import CopyWord
from tests.evaluation.oracle import Copier
from tests.parallel.training_run import join

SAMPLES = 4 * 5


class Gloo:
    """The processes of the default group."""

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def barrier(self, name: str | None = None) -> None:
        dist.barrier()


def evaluate(
    rank: int, num_processes: int, port: int, folder: Path, config: MLAConfig, die: str | None
) -> None:
    """Evaluate; `die` says where rank 1, or the only one, ends without a word."""
    if num_processes > 1:
        join(rank, num_processes, port)
        dist.init_process_group("gloo")
    seen = itertools.count(1)
    score, append, merge = CopyWord.score, runner.append_rows, runner.merge_rank_files

    def scored(self: CopyWord, *args: Any) -> Any:
        answer = score(self, *args)
        append_row(folder / f"answered{rank}.jsonl", {"answered": 1})
        if die == "within a cell" and rank == num_processes - 1 and next(seen) == 5:
            os._exit(9)
        return answer

    def appended(file: Path, rows: list[dict[str, Any]]) -> None:
        append(file, rows)
        if die == "in a line" and rank == num_processes - 1 and next(seen) == 2:
            os.truncate(file, file.stat().st_size - 9)
            os._exit(9)

    def merged(*args: Any) -> None:
        if die == "before the merge" and next(seen) == 2:
            os._exit(9)
        merge(*args)

    CopyWord.score = scored  # type: ignore[method-assign]
    runner.append_rows, runner.merge_rank_files = appended, merged
    ranks = Gloo() if num_processes > 1 else None
    suite = CopyWord(Config(samples=5))
    rows = run_suite(Copier(config), ByteTokenizer(), suite, folder / "samples.jsonl", ranks=ranks)
    assert [row["n"] for row in rows] == [5] * 4


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = sorted(read_samples(folder), key=lambda row: str(sample_key(row)))
    return [{k: v for k, v in row.items() if k not in ("seconds", "model")} for row in found]


@pytest.mark.parametrize(
    ("num_processes", "die"),
    [(1, "within a cell"), (2, "within a cell"), (2, "in a line"), (2, "before the merge")],
)
def test_nothing_is_repeated_or_lost(
    spawn: Callable[..., None],
    make_model: Callable[..., Any],
    tmp_path: Path,
    num_processes: int,
    die: str,
) -> None:
    config = make_model(vocab_size=320).config
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run_suite(Copier(config), ByteTokenizer(), CopyWord(Config(samples=5)), whole / "samples.jsonl")
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):  # or a lost peer's
        spawn(evaluate, num_processes, killed, config, die)
    before = [
        line for file in killed.glob("samples*") for line in file.read_text().splitlines(True)
    ]
    done = [line for line in before if line.endswith("\n")]
    assert len(done) > 0
    assert (len(done) == SAMPLES) == (die == "before the merge")
    for file in killed.glob("answered*"):
        file.unlink()
    spawn(evaluate, num_processes, killed, config, None)
    answered = sum(len(file.read_text().splitlines()) for file in killed.glob("answered*"))
    assert answered == SAMPLES - len(done)  # none again, none left out
    lines = (killed / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == SAMPLES
    assert set(done) <= set(lines)  # with the seconds that they took
    assert rows_of(killed) == rows_of(whole)
    assert not list(killed.glob("samples.rank*"))
