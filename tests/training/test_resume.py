"""A run stopped at any step and resumed gives the same losses as one that was not: exact on CPU."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import SHORT

# The curriculum changes its length within these steps, so the resumed part depends on its state.
RUN = (
    *SHORT,
    "trainer.max_steps=9",
    "callbacks.context_length.check_every_n_steps=3",
    "callbacks.context_length.threshold=0.0001",
    "callbacks.checkpoint.every_n_steps=1",
    "callbacks.checkpoint.keep_every_n_steps=1",
    "trainer.val_check_interval=4",
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "optimizer.warmup_steps=3",
)


GOLDEN = [6.59914, 6.70581, 6.66261, 5.61696, 5.47589, 5.31873, 5.11170, 4.80602, 4.83878]


def losses(folder: Path) -> dict[int, tuple[str, str, str]]:
    rows = csv.DictReader((folder / "csv" / "metrics.csv").open())
    keys = ("train/loss", "train/context_length", "lr")
    return {int(r["step"]): tuple(r[k] for k in keys) for r in rows if r["train/loss"]}


@pytest.fixture
def unbroken(ic: Callable[..., int], tmp_path: Path) -> dict[int, tuple[str, str, str]]:
    assert ic(*RUN, "run_id=whole") == 0
    return losses(tmp_path / "runs/debug/whole")


@pytest.mark.slow
def test_resume_is_exact(
    ic: Callable[..., int], unbroken: dict[int, tuple[str, str, str]], tmp_path: Path
) -> None:
    assert sorted(unbroken) == list(range(9))
    assert {row[1] for row in unbroken.values()} == {"128.0", "256.0"}
    whole = tmp_path / "runs/debug/whole/checkpoints"
    for stop in (2, 3, 4, 7):
        resumed = f"run_id=from{stop}"
        assert ic(*RUN, resumed, f"ckpt_path={whole / f'step={stop}'}") == 0
        after = losses(tmp_path / f"runs/debug/from{stop}")
        assert after == {step: row for step, row in unbroken.items() if step >= stop}
        end = load_file(tmp_path / f"runs/debug/from{stop}/checkpoints/last/model.safetensors")
        for name, tensor in load_file(whole / "last/model.safetensors").items():
            assert end[name].equal(tensor), name


def test_workers_do_not_change_the_data(
    ic: Callable[..., int], unbroken: dict[int, tuple[str, str, str]], tmp_path: Path
) -> None:
    assert ic(*RUN, "run_id=workers", "data.num_workers=2") == 0
    assert losses(tmp_path / "runs/debug/workers") == unbroken


@pytest.mark.slow
def test_resume_amid_a_stage_and_at_its_border(ic: Callable[..., int], tmp_path: Path) -> None:
    """Facts in text, half of the rows without any, stages of the length and accumulated steps."""
    (tmp_path / "book.txt").write_text(" ".join(f"Line {n} of a book." for n in range(900)))
    (tmp_path / "other.txt").write_text(" ".join(f"Sentence {n} of another." for n in range(900)))
    curriculum = ("check_every_n_steps", "threshold")
    run = (
        *(option for option in RUN if not any(name in option for name in curriculum)),
        "data=retrieval",
        "data.train_files=[book.txt]",
        "data.val_files=[other.txt]",
        "data.token_cache=tokens",
        "data.facts_fraction=0.5",
        "data.question_weights={along: 1, end: 1, chat: 1}",
        "data.task_weights={fact: 1}",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=4",
        "callbacks.context_length.start_length=256",  # of the experiment, which doubles
        "callbacks.context_length.threshold=0.95",
        "callbacks.context_length.stages=[[0,128],[2,256]]",
    )
    assert ic(*run, "run_id=whole") == 0
    whole = losses(tmp_path / "runs/debug/whole")
    assert [row[1] for row in whole.values()] == ["128.0", "128.0", "256.0", "256.0"]
    saved = tmp_path / "runs/debug/whole/checkpoints"
    for stop in (1, 2):
        workers = f"data.num_workers={2 if stop == 1 else 0}"
        assert ic(*run, workers, f"run_id=from{stop}", f"ckpt_path={saved / f'step={stop}'}") == 0
        after = losses(tmp_path / f"runs/debug/from{stop}")
        assert after == {step: row for step, row in whole.items() if step >= stop}


def test_golden_losses(unbroken: dict[int, tuple[str, str, str]]) -> None:
    """The first steps of the tiny model; a change in any part of training shows here.

    Compared to four digits: sums of float32 differ in the last bits between processors.
    """
    got = [float(unbroken[step][0]) for step in range(9)]
    assert got == pytest.approx(GOLDEN, rel=2e-4)
