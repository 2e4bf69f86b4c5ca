"""A run that is killed and resumed leaves what an undisturbed one does."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ic.training.language_modeling import LanguageModelingModule
from tests.conftest import SHORT
from tests.run.killed import kill_in, run_and_die

Run = Callable[..., int]
RUN = (
    *SHORT,
    "data.tokens_per_batch=256",
    "model.num_hidden_layers=1",
    "model/adapter=lora",
    "model.adapter.lora_dropout=0.2",
    "callbacks.context_length=null",
    "callbacks.memory.every_n_steps=2",
    "callbacks.passkey={every_n_steps: 4, cheap_lengths: [256], at_end: false}",
    "callbacks.checkpoint={every_n_steps: 2, mode: max}",
    "trainer.val_check_interval=2",
    "trainer.max_steps=8",
    "overwrite=false",
)
# Measured, and not in the first steps of a process.
MEASURED = ("train/tokens_per_s", "train/step_time_s", "train/data_wait_share")


def kill_in_step(method: str, step: int) -> None:
    kill_in(LanguageModelingModule, method, lambda module: module.trainer.global_step == step)


def logged(run: Path) -> list[dict[str, str]]:
    """Every row in order, without what a clock or a memory counter says."""
    with (run / "csv/metrics.csv").open(newline="") as lines:
        return [
            {
                key: "measured" if key.startswith("memory/") else value
                for key, value in row.items()
                if value and key not in MEASURED
            }
            for row in csv.DictReader(lines)
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ic.cli import main

    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit) as end:
            main(list(RUN))
    finally:
        os.chdir(before)
    assert not end.value.code
    return folder / "runs/debug/default"


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("training_step", 3),  # after the checkpoint and the validation of step 2
        ("validation_step", 4),  # in the validation of the step that was saved
        ("validation_step", 8),  # in that of the last step
    ],
)
def test_resumes_as_if_it_had_not_been_killed(
    ic: Run, whole: Path, tmp_path: Path, method: str, step: int
) -> None:
    run_and_die(tmp_path, RUN, kill_in_step, method, step)
    run = tmp_path / "runs/debug/default"
    assert ic(*RUN, "ckpt_path=last") == 0
    assert logged(run) == logged(whole)
    scores = {int(r["step"]) + 1: float(r["val/loss"]) for r in logged(run) if "val/loss" in r}
    assert list(scores) == [2, 4, 6, 8]
    assert {int(r["step"]) + 1 for r in logged(run) if "passkey/256" in r} == {4, 8}
    best = os.readlink(run / "checkpoints/best")
    assert best == os.readlink(whole / "checkpoints/best") == f"step={max(scores, key=scores.get)}"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )
    ended = load_file(run / "checkpoints/last/adapter/adapter_model.safetensors")
    expected = load_file(whole / "checkpoints/last/adapter/adapter_model.safetensors")
    assert ended.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ended[name].equal(tensor), name
