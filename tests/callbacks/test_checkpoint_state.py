"""What a checkpoint carries over a stop, and what a run leaves of another and of the process."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from safetensors.torch import load_file

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.callbacks.options import CheckpointOptions
from ic.checkpoint.folder import read_trainer_state
from ic.files.run_folder import RunFolder
from tests.chaos.compare import differences
from tests.conftest import SHORT

Run = Callable[..., int]
RUN = (*SHORT, "callbacks.passkey=null", "callbacks.memory=null", "callbacks.context_length=null")
RUN = (*RUN, "overwrite=false")


def names(folder: Path) -> dict[str, str | None]:
    return {p.name: os.readlink(p) if p.is_symlink() else None for p in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_outlives_a_stop(ic: Run, tmp_path: Path, mode: str) -> None:
    """The loss falls: with `max` the first validation stays the best, with `min` the last is."""
    args = (
        *RUN,
        f"callbacks.checkpoint.mode={mode}",
        "callbacks.checkpoint.every_n_steps=2",
        "trainer.val_check_interval=2",
        "trainer.num_sanity_val_steps=0",
    )
    folder = tmp_path / "runs/debug/default"
    longer = ("trainer.max_steps=8", "allow_config_change=true", "ckpt_path=last")
    assert ic(*args, "trainer.max_steps=4") == 0
    assert ic(*args, *longer) == 0
    rows = csv.DictReader((folder / "csv/metrics.csv").open())
    scores = {int(r["step"]) + 1: float(r["val/loss"]) for r in rows if r["val/loss"]}
    assert list(scores) == [2, 4, 6, 8]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    best = {"max": "step=2", "min": "step=8"}[mode]
    found = names(folder / "checkpoints")
    assert found == {"best": best, "last": "step=8", best: None, "step=8": None}


def test_random_numbers_go_on_where_they_stopped(ic: Run, tmp_path: Path) -> None:
    """With dropout the losses after a resume depend on the generator's state."""
    args = (
        *RUN,
        "model/adapter=lora",
        "model.adapter.lora_dropout=0.5",
        "trainer.max_steps=6",
        "callbacks.checkpoint.every_n_steps=3",
        "callbacks.checkpoint.keep_every_n_steps=3",
        "trainer.val_check_interval=100",
        "optimizer.warmup_steps=0",
        "optimizer.lr=0.05",
    )
    assert ic(*args, "run_id=whole") == 0
    whole = tmp_path / "runs/debug/whole/checkpoints"
    assert ic(*args, "run_id=resumed", f"ckpt_path={whole}/step=3") == 0
    resumed = tmp_path / "runs/debug/resumed/checkpoints"
    ends = [read_trainer_state(run / "last")["rng_states"] for run in (whole, resumed)]
    assert ends[0][0]["torch"].equal(ends[1][0]["torch"])
    start = read_trainer_state(whole / "step=3")["rng_states"]
    assert not start[0]["torch"].equal(ends[0][0]["torch"])  # dropout drew numbers
    adapters = [
        load_file(run / "last/adapter/adapter_model.safetensors") for run in (whole, resumed)
    ]
    assert all(tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items())
    assert any(tensor.abs().max() > 0 for name, tensor in adapters[0].items() if "lora_B" in name)


def test_later_steps_of_a_run_begun_anew_are_not_its_newest(ic: Run, tmp_path: Path) -> None:
    args = (
        *RUN,
        "callbacks.checkpoint.every_n_steps=1",
        "callbacks.checkpoint.keep_last=2",
        "callbacks.checkpoint.monitor=null",
        "trainer.val_check_interval=100",
    )
    folder = tmp_path / "runs/debug/default/checkpoints"
    assert ic(*args, "trainer.max_steps=6") == 0
    assert set(names(folder)) == {"last", "step=5", "step=6"}
    assert ic(*args, "trainer.max_steps=3", "overwrite=true") == 0
    assert names(folder) == {"last": "step=3", "step=2": None, "step=3": None}


@pytest.mark.parametrize("ending", ["at its end", "by an exception"])
def test_the_interrupt_handler_is_given_back(tmp_path: Path, ending: str) -> None:
    """By the callback itself: what follows training is not training's to interrupt."""

    def own(signum: int, frame: object) -> None:
        raise AssertionError

    callback: Any = FolderCheckpoint(CheckpointOptions())
    trainer = SimpleNamespace(
        default_root_dir=tmp_path,
        global_step=0,
        world_size=1,
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    before = signal.signal(signal.SIGINT, own)
    try:
        callback.setup(trainer, None, "fit")
        callback.on_train_start(trainer, None)
        assert signal.getsignal(signal.SIGINT) not in (own, signal.default_int_handler)
        if ending == "at its end":
            callback.teardown(trainer, None, "fit")
        else:
            callback.on_exception(trainer, None, ArithmeticError())
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_kill_leaves_of_an_old_checkpoint_is_not_taken_for_one(
    ic: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the first file that is removed; the next start removes the rest."""
    args = (*RUN, "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.monitor=null")
    args = (*args, "trainer.val_check_interval=100")
    folder = tmp_path / "runs/debug/default/checkpoints"

    class Killed(BaseException):
        pass

    def die(path: object, **kwargs: object) -> None:
        if Path(str(path)).name.partition(".")[0] == "step=2" and "old" not in str(path):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ic.callbacks.checkpoint.shutil.rmtree", die)
        with pytest.raises(Killed):
            ic(*args, "trainer.max_steps=4")
    assert RunFolder(folder.parent).saved_steps() == [4]
    assert ic(*args, "trainer.max_steps=4", "ckpt_path=last") == 0
    assert names(folder) == {"last": "step=4", "step=4": None}


def test_a_best_holds_the_generators_of_training(ic: Run, tmp_path: Path) -> None:
    """It is saved within a validation, whose own draws a run without a stop does not see."""
    args = (*RUN, "callbacks.checkpoint.every_n_steps=2", "trainer.val_check_interval=3")
    args = (*args, "trainer.max_steps=4")
    assert ic(*args) == 0
    folder = tmp_path / "runs/debug/default/checkpoints"
    best, last = (read_trainer_state(folder / name)["rng_states"][0] for name in ("best", "last"))
    assert names(folder)["best"] == "step=3"
    assert best["torch"].equal(last["torch"])  # no step of this model draws


@pytest.mark.slow
def test_a_best_is_the_same_with_a_stop_before_its_validation(
    ic: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop saves before the validation that finds the best, an undisturbed run within it."""
    args = (*SHORT, "overwrite=false", "callbacks.context_length=null", "callbacks.passkey=null")
    args = (*args, "trainer.max_steps=8", "trainer.val_check_interval=3")
    args = (*args, "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.mode=max")
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    agree = FolderCheckpoint.agree

    def stop(self: FolderCheckpoint, trainer: Trainer) -> None:
        self._asked_to_stop = trainer.global_step == 3
        agree(self, trainer)

    monkeypatch.chdir(folders[0])
    assert ic(*args) == 0
    monkeypatch.chdir(folders[1])
    with monkeypatch.context() as patch:
        patch.setattr(FolderCheckpoint, "agree", stop)
        assert ic(*args) == 130
    assert ic(*args, "ckpt_path=last") == 0
    runs = [RunFolder(folder / "runs/debug/default") for folder in folders]
    for run in runs:
        assert names(run.checkpoints)["best"] == "step=3"
        state = read_trainer_state(run.checkpoints / "best")["callbacks"]
        assert state["FolderCheckpoint"] == {"best_score": None}  # a resume finds it again
        assert "validation" not in state["MemoryProfiler"]["records"]
    assert differences(*(run.path for run in runs)) == []
