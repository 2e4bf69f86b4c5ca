"""A run that is killed and resumed leaves what an undisturbed one does."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ic.evaluation.passkey.suite import PasskeySuite
from ic.files.json_lines import read_rows, write_rows
from ic.files.results import is_finished
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
    "callbacks.passkey={every_n_steps: 4, cheap_lengths: [256]}",
    "evaluation.lengths=[256]",
    "evaluation.depths=[0.0,1.0]",
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


def kill_in_prompt(number: int) -> None:
    seen = itertools.count(1)
    kill_in(
        PasskeySuite, "score", lambda suite: suite.grid.split == "test" and next(seen) == number
    )


def results(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Status and rows, without what a clock or a memory counter says."""
    found = json.loads((run / "results.json").read_text())
    measured = ("_s", "_share", "_bytes", "_timed", "mfu")
    rows = [
        {key: value for key, value in row.items() if not key.endswith(measured)}
        for row in found["rows"]
    ]
    return found["status"], rows


def assert_same(run: Path, whole: Path) -> None:
    """Whatever two runs leave, beside what a clock or a memory counter says."""
    assert logged(run) == logged(whole)
    assert results(run) == results(whole)
    for name in ("num_steps", "first_step", "last_step", "tokens_seen"):
        of_run, of_whole = (json.loads((f / "throughput.json").read_text()) for f in (run, whole))
        assert of_run[name] == of_whole[name], name
    of_run, of_whole = (
        json.loads((f / "memory/memory.json").read_text())["phases"] for f in (run, whole)
    )
    assert of_run.keys() == of_whole.keys()
    for phase in ("forward", "backward", "optimizer_step"):
        assert of_run[phase]["num_measured"] == of_whole[phase]["num_measured"], phase
    for folder in (run, whole):
        assert (folder / "passkey/heatmap.png").is_file()
    checkpoints = [
        {p.name: p.is_symlink() and os.readlink(p) for p in (folder / "checkpoints").iterdir()}
        for folder in (run, whole)
    ]
    assert checkpoints[0] == checkpoints[1]
    ended, expected = (
        load_file(folder / "checkpoints/last/adapter/adapter_model.safetensors")
        for folder in (run, whole)
    )
    assert ended.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ended[name].equal(tensor), name


def test_what_an_undisturbed_run_leaves(whole: Path) -> None:
    """What the runs below are compared with is there."""
    scores = {int(r["step"]) + 1: float(r["val/loss"]) for r in logged(whole) if "val/loss" in r}
    assert list(scores) == [2, 4, 6, 8]
    best = os.readlink(whole / "checkpoints/best")
    assert best == f"step={max(scores, key=scores.get)}"  # type: ignore[arg-type]
    assert best != os.readlink(whole / "checkpoints/last")
    assert [int(r["step"]) for r in logged(whole) if "passkey/256" in r] == [3, 7, 8]
    status, rows = results(whole)
    assert status == "finished"
    assert {row["what"] for row in rows} == {"training", "memory", "passkey"}
    assert [row["num_steps"] for row in rows if row["what"] == "training"] == [8]
    assert len(read_rows(whole / "passkey/samples.jsonl")) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("training_step", 3),  # after the checkpoint and the validation of step 2
        ("validation_step", 4),  # in the validation of the step that was saved
        ("validation_step", 8),  # in that of the last step
    ],
)
def test_killed_in_training(ic: Run, whole: Path, tmp_path: Path, method: str, step: int) -> None:
    run_and_die(tmp_path, RUN, kill_in_step, method, step)
    assert ic(*RUN, "ckpt_path=last") == 0
    assert_same(tmp_path / "runs/debug/default", whole)


@pytest.mark.slow
def test_killed_in_the_final_evaluation(ic: Run, whole: Path, tmp_path: Path) -> None:
    run_and_die(tmp_path, RUN, kill_in_prompt, 3)
    run = tmp_path / "runs/debug/default"
    before = read_rows(run / "passkey/samples.jsonl")
    assert len(before) == 2
    assert not is_finished(run / "results.json")
    assert ic(*RUN, "ckpt_path=last") == 0
    assert_same(run, whole)
    after = read_rows(run / "passkey/samples.jsonl")
    assert after[:2] == before  # with the seconds that they took
    assert len(after) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted; continue with fit run={run}\n"),
        (signal.SIGTERM, 143, "terminated; the checkpoint is saved, continue with fit run={run}\n"),
        (signal.SIGUSR1, 75, "stopped by a signal; continue with fit run={run}\n"),
    ],
)
def test_a_signal_in_the_final_evaluation(
    ic: Run,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    said: str,
) -> None:
    run = tmp_path / "runs/debug/default"
    shutil.copytree(whole, run, symlinks=True)
    (run / "results.json").unlink()
    samples = read_rows(run / "passkey/samples.jsonl")
    write_rows(run / "passkey/samples.jsonl", samples[:1])
    score, seen = PasskeySuite.score, itertools.count(1)

    def signalled(self: PasskeySuite, *args: Any) -> Any:
        if next(seen) == 2:
            os.kill(os.getpid(), number)
        return score(self, *args)

    monkeypatch.setattr(PasskeySuite, "score", signalled)
    assert ic(*RUN, "ckpt_path=last") == code
    handler = getattr(signal.getsignal(number), "__module__", "")
    assert not str(handler).startswith("ic.")  # ours are taken back
    assert said.format(run=run) in capsys.readouterr().err
    status, rows = results(run)
    assert status == "evaluation incomplete"
    assert {row["what"] for row in rows} == {"training", "memory"}
    assert len(read_rows(run / "passkey/samples.jsonl")) == 3  # the prompt at hand was answered
    assert not is_finished(run / "results.json")
    assert ic(*RUN, "ckpt_path=last") == 0
    assert_same(run, whole)


@pytest.mark.slow
def test_a_finished_run_is_left_alone(
    ic: Run, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/debug/default"
    shutil.copytree(whole, run, symlinks=True)

    def state() -> dict[str, tuple[int, bytes]]:
        files = (p for p in run.rglob("*") if p.is_file())
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = state()
    for start in ("ckpt_path=last", "ckpt_path=auto"):
        assert ic(*RUN, start) == 0
        assert "8 of 8 steps are done" in capsys.readouterr().err
        assert state() == before
    longer = ("trainer.max_steps=9", "allow_config_change=true")
    run_and_die(tmp_path, (*RUN, "ckpt_path=last", *longer), kill_in_step, "training_step", 8)
    status, rows = results(run)
    assert status == "training goes on"  # nothing lost, but not finished any more
    assert rows == results(whole)[1]
    assert ic(*RUN, "ckpt_path=last", *longer) == 0
    status, rows = results(run)
    assert status == "finished"
    assert [row["num_steps"] for row in rows if row["what"] == "training"] == [9]
    assert ic(*RUN, "overwrite=true", "trainer.max_steps=1") == 0
    assert [r["num_steps"] for r in results(run)[1] if r["what"] == "training"] == [1]
