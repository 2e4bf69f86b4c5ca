"""Which checkpoint a run starts from, and that a changed configuration is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from ic.checkpoint.folder import read_trainer_state
from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.training.language_modeling import LanguageModelingModule
from tests.conftest import SHORT
from tests.run.killed import kill_in, run_and_die

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
RUN = (
    *SHORT,
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "callbacks.context_length=null",
    "trainer.val_check_interval=50",
    "overwrite=false",
)


def steps(folder: Path) -> list[int]:
    rows = csv.DictReader((folder / "csv/metrics.csv").open())
    return [int(row["step"]) for row in rows if row["train/loss"]]


def test_auto_begins_and_continues(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "runs/debug/default"
    auto = (*RUN, "ckpt_path=auto")
    assert ic(*auto, "trainer.max_steps=2") == 0
    assert "continuing from" not in capsys.readouterr().err
    assert ic(*auto, "trainer.max_steps=3", "allow_config_change=true") == 0
    assert f"continuing from {run}/checkpoints/step=2" in capsys.readouterr().err
    assert steps(run) == [0, 1, 2]
    # overwrite=true asks for a new beginning
    assert ic(*auto, "trainer.max_steps=1", "overwrite=true") == 0
    assert "continuing from" not in capsys.readouterr().err
    assert steps(run) == [0]


def test_repeated_steps_are_logged_once(ic: Run, tmp_path: Path) -> None:
    """From an older checkpoint, as after a node failure: its steps replace those of before."""
    run = tmp_path / "runs/debug/default"
    keep = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_every_n_steps=2")
    assert ic(*RUN, *keep, "trainer.max_steps=5") == 0
    before = (run / "csv/metrics.csv").read_text()
    assert ic(*RUN, *keep, "trainer.max_steps=5", f"ckpt_path={run}/checkpoints/step=2") == 0
    assert steps(run) == [0, 1, 2, 3, 4]

    def loss(text: str) -> list[str]:
        return [row["train/loss"] for row in csv.DictReader(text.splitlines())]

    assert loss((run / "csv/metrics.csv").read_text()) == loss(before)


def test_a_restart_ignores_where_the_job_first_started(
    ic: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job given another run's checkpoint, or overwrite=true, continues its own after a requeue."""
    assert ic(*RUN, "trainer.max_steps=2", "run_id=first") == 0
    first = tmp_path / "runs/debug/first/checkpoints/step=2"
    given = (*RUN, "run_id=second", f"ckpt_path={first}", "trainer.max_steps=4")
    assert ic(*given) == 0
    assert ic(*given) == 2  # would write over its own checkpoints
    given = (*given, "overwrite=true")
    assert ic(*given) == 0
    assert steps(tmp_path / "runs/debug/second") == [2, 3]
    for name in (
        "SLURM_NTASKS",
        "SLURM_NNODES",
        "SLURM_TASKS_PER_NODE",
        "SLURM_RESTART_COUNT",
        "SLURM_NTASKS_PER_NODE",
    ):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29508")
    assert ic(*given, "trainer.max_steps=5", "allow_config_change=true") == 0
    assert steps(tmp_path / "runs/debug/second") == [2, 3, 4]


def test_beginning_anew_forgets_the_old_checkpoints(ic: Run, tmp_path: Path) -> None:
    """But not before the new run's configuration is known to be right."""
    assert ic(*RUN, "trainer.max_steps=2") == 0
    checkpoints = tmp_path / "runs/debug/default/checkpoints"
    wrong = ("overwrite=true", "callbacks.checkpoint.monitor=val/nothing")
    assert ic(*RUN, *wrong) == 2
    assert (checkpoints / "last").exists()
    run_and_die(
        tmp_path, (*RUN, "overwrite=true"), kill_in, LanguageModelingModule, "training_step"
    )
    assert not (checkpoints / "last").exists()
    assert not (checkpoints / "best").exists()


def rates(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "csv/metrics.csv").open())
    return [float(row["lr"]) for row in rows if row["train/loss"]]


@pytest.mark.slow
def test_a_longer_run_and_another_rate_hold_from_the_first_step(ic: Run, tmp_path: Path) -> None:
    """The end of the shorter run, where its rate had come near zero, is forgotten."""
    schedule = ("optimizer.warmup_steps=0", "optimizer.decay_fraction=0.5")
    args = (*RUN, *schedule, "trainer.max_steps=8")
    assert ic(*args, "run_id=whole") == 0
    assert ic(*args, "run_id=longer", "trainer.max_steps=4") == 0
    whole, longer = (tmp_path / "runs/debug" / name for name in ("whole", "longer"))
    assert rates(longer) == pytest.approx([0.004, 0.004, 0.004, 0.002])
    again = ("ckpt_path=last", "allow_config_change=true")
    assert ic(*args, "run_id=longer", *again) == 0
    assert rates(longer)[4:] == rates(whole)[4:] == pytest.approx([0.004, 0.003, 0.002, 0.001])
    changed = ("optimizer.lr=0.008", "optimizer.weight_decay=0.25", "trainer.max_steps=16")
    assert ic(*args, "run_id=longer", *again, *changed) == 0
    assert rates(longer)[8:10] == pytest.approx([0.008, 0.007])
    groups = read_trainer_state(longer / "checkpoints/last")["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups if group["weight_decay"]} == {0.25}


def test_names_every_changed_key(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    assert ic(*RUN, "trainer.max_steps=1") == 0
    capsys.readouterr()
    changed = (*RUN, "ckpt_path=last", "trainer.max_steps=2", "optimizer.lr=0.5", "seed=3")
    assert ic(*changed) == 2
    error = capsys.readouterr().err
    for part in (
        "optimizer.lr: 0.004 -> 0.5",
        "seed: 0 -> 3",
        "trainer.max_steps: 1 -> 2",
        "allow_config_change=true",
    ):
        assert part in error
    assert "ckpt_path:" not in error
    config = (tmp_path / "runs/debug/default/config.yaml").read_text()
    assert "lr: 0.004" in config
    assert ic(*changed, "allow_config_change=true") == 0
    assert "lr: 0.5" in (tmp_path / "runs/debug/default/config.yaml").read_text()


@pytest.mark.parametrize("data", ["passkey", "text", "sft"])
def test_the_keys_that_may_change(data: str) -> None:
    """Whatever is not listed here shapes what a run computes."""
    config, _ = compose_config("fit", RunConfig, [f"data={data}"])

    def marked(part: Any, prefix: str = "") -> Iterator[str]:
        for field in fields(part):
            value = getattr(part, field.name)
            if field.metadata.get("may_change"):
                yield f"{prefix}{field.name}"
            elif is_dataclass(value):
                yield from marked(value, f"{prefix}{field.name}.")

    assert sorted(marked(config)) == [
        "allow_config_change",
        "callbacks.checkpoint",
        "callbacks.gpu_utilisation",
        "callbacks.loss_curve",
        "callbacks.memory",
        "callbacks.profiler",
        "callbacks.progress",
        "callbacks.prometheus",
        "callbacks.requeue",
        "callbacks.samples",
        "callbacks.suites",
        "callbacks.throughput",
        "callbacks.watchdog",
        "ckpt_path",
        "data.num_workers",
        "data.worker_timeout_s",
        "logger",
        "model.attention",
        "model.compile",
        "model.fp8",
        "model.fp8_keep",
        "model.fp8_keep_layers",
        "model.norm",
        "model.rope",
        "name",
        "output_dir",
        "overwrite",
        "report",
        "run_id",
        "strategy",
        "suite",
        "trainer.devices",
        "trainer.log_every_n_steps",
        "trainer.max_time",
        "trainer.num_nodes",
    ]


def test_a_key_that_begins_as_one_that_may_change_may_not(ic: Run, capsys: Capture) -> None:
    """`model.rope` says where the rotation is computed, `model.rope_interleave` what it computes."""
    assert ic(*RUN, "trainer.max_steps=1") == 0
    capsys.readouterr()
    changed = ("model.rope_interleave=false", "strategy=ddp")
    assert ic(*RUN, "ckpt_path=last", "trainer.max_steps=1", *changed) == 2
    error = capsys.readouterr().err
    assert "model.rope_interleave: True -> False" in error
    assert "strategy" not in error


def test_what_may_change(ic: Run) -> None:
    assert ic(*RUN, "trainer.max_steps=1") == 0
    assert (
        ic(
            *RUN,
            "ckpt_path=last",
            "trainer.max_steps=1",
            "trainer.max_time=00:00:10:00",
            "logger=none",
            "callbacks.requeue.margin_s=10",
            "callbacks.progress=false",
            "callbacks.throughput=null",
            "data.num_workers=1",
        )
        == 0
    )


def test_validation_counts_optimizer_steps(ic: Run, tmp_path: Path) -> None:
    every_second = ("trainer.val_check_interval=2", "trainer.accumulate_grad_batches=3")
    assert ic(*RUN, *every_second, "trainer.max_steps=4", "trainer.log_every_n_steps=1") == 0
    rows = list(csv.DictReader((tmp_path / "runs/debug/default/csv/metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [1, 3]
