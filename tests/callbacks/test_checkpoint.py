"""What is kept, where the links point, and what Ctrl-C leaves, in real runs."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.callbacks.options import CheckpointOptions
from ic.checkpoint.folder import trained_length
from ic.files.run_folder import RunFolder
from tests.conftest import SHORT

RUN = (*SHORT, "callbacks.passkey=null", "callbacks.memory=null", "callbacks.context_length=null")
ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> dict[str, str | None]:
    return {p.name: os.readlink(p) if p.is_symlink() else None for p in folder.iterdir()}


def test_keeps_last_best_and_every_nth(ic: Callable[..., int], tmp_path: Path) -> None:
    args = (
        *RUN,
        "trainer.max_steps=8",
        "callbacks.checkpoint.every_n_steps=2",
        "callbacks.checkpoint.keep_every_n_steps=4",
        "trainer.val_check_interval=3",
    )
    assert ic(*args) == 0
    found = names(tmp_path / "runs/debug/default/checkpoints")
    assert found.pop("last") == "step=8"
    best = found.pop("best")
    assert best in ("step=3", "step=6")
    assert set(found) == {"step=4", "step=8", best}
    rows = csv.DictReader((tmp_path / "runs/debug/default/csv/metrics.csv").open())
    scores = {int(r["step"]) + 1: float(r["val/loss"]) for r in rows if r["val/loss"]}
    assert best == f"step={min(scores, key=scores.get)}"
    last = tmp_path / "runs/debug/default/checkpoints/last"
    assert RunFolder(tmp_path / "runs/debug/default").resolve_checkpoint("last") == last.resolve()
    assert trained_length(last) == 256


def test_a_score_that_is_no_number_is_not_the_best(
    ic: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {2: math.nan, 4: 2.0, 6: 3.0}
    metrics = Trainer.callback_metrics.fget

    def poisoned(trainer: Trainer) -> dict[str, torch.Tensor]:
        found = dict(metrics(trainer))
        return found | {"val/loss": torch.tensor(scores.get(trainer.global_step, 9.0))}

    monkeypatch.setattr(Trainer, "callback_metrics", property(poisoned))
    assert ic(*RUN, "trainer.max_steps=6", "trainer.val_check_interval=2") == 0
    assert os.readlink(tmp_path / "runs/debug/default/checkpoints/best") == "step=4"


@pytest.mark.slow
def test_refuses_to_overwrite_a_run(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    args = (*RUN, "trainer.max_steps=2", "overwrite=false")
    assert ic(*args) == 0
    capsys.readouterr()
    assert ic(*args) == 2
    error = capsys.readouterr().err
    assert "already holds a checkpoint; continue with ckpt_path=last" in error
    assert ic(*args, "overwrite=true") == 0
    longer = (*args, "ckpt_path=last", "trainer.max_steps=3")
    assert ic(*longer) == 2
    assert "trainer.max_steps: 2 -> 3" in capsys.readouterr().err
    assert ic(*longer, "allow_config_change=true") == 0


def test_unknown_monitor(ic: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert ic(*RUN, "callbacks.checkpoint.monitor=val/los") == 2
    assert "the validation logs val/loss, val/answer_accuracy" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_saves_and_resumes_exactly(tmp_path: Path) -> None:
    """A real SIGINT to a real process: exit code 130, a whole checkpoint, the losses of an unbroken
    run.
    """
    args = [
        sys.executable,
        "-m",
        "ic",
        *RUN,
        "trainer.max_steps=25",
        "trainer.val_check_interval=100",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(
        [*args, "run_id=broken"],
        cwd=tmp_path,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert running.stdout is not None
    for line in running.stdout:  # the first step has been taken
        if line.startswith("step 1/"):
            break
    running.send_signal(signal.SIGINT)
    output = running.communicate()[0]
    assert running.returncode == 130, output
    assert f"interrupted; continue with fit run={tmp_path}/runs/debug/broken\n" in output
    folder = tmp_path / "runs/debug/broken/checkpoints"
    step = int(os.readlink(folder / "last").removeprefix("step="))
    assert 1 <= step < 25
    assert not list(folder.glob("*.partial-*"))
    for extra in (["run_id=broken", "ckpt_path=last"], ["run_id=whole"]):
        subprocess.run([*args, *extra], cwd=tmp_path, env=env, check=True, capture_output=True)

    def after(run: str) -> dict[str, str]:
        rows = csv.DictReader((tmp_path / f"runs/debug/{run}/csv/metrics.csv").open())
        return {
            r["step"]: r["train/loss"] for r in rows if r["train/loss"] and int(r["step"]) >= step
        }

    assert after("broken") == after("whole")
    assert len(after("whole")) == 25 - step


def test_second_interrupt_ends_at_once(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a shell's code for Ctrl-C; Lightning's trainer would make it 1."""
    on_step_end = FolderCheckpoint.on_step_end

    def twice(self: FolderCheckpoint, trainer: Trainer) -> None:
        on_step_end(self, trainer)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FolderCheckpoint, "on_step_end", twice)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert ic(*RUN, "callbacks.checkpoint.every_n_steps=1") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    said = capsys.readouterr().err
    folder = tmp_path / "runs/debug/default"
    assert said.endswith(f"ic: interrupted; continue from step=1 with fit run={folder}\n")
    assert "Detected KeyboardInterrupt" not in said
    assert os.readlink(tmp_path / "runs/debug/default/checkpoints/last") == "step=1"


@pytest.mark.parametrize(
    "changes",
    [
        {"every_n_steps": 0},
        {"keep_last": 0},
        {"keep_every_n_steps": 3, "every_n_steps": 2},
        {"mode": "up"},
    ],
)
def test_refuses(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"callbacks.checkpoint.{next(iter(changes))}="):
        CheckpointOptions(**changes)
