"""Signals, the time limit and the cap on restarts, in real runs; `scontrol` and `squeue` are small
programs that answer as SLURM's do. tests/slurm has the real ones.
"""

from __future__ import annotations

import csv
import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ic.callbacks.options import SlurmRequeueOptions
from ic.callbacks.requeue import SlurmRequeue, Stop
from ic.machine.slurm_job import SlurmError, SlurmJob
from tests.conftest import SHORT

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    *SHORT,
    "callbacks.memory=null",
    "callbacks.context_length=null",
    "trainer.max_steps=5",
    "trainer.val_check_interval=3",
    "run_id=job",
    "ckpt_path=auto",
)
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "1",
    "SLURM_NNODES": "1",
    "SLURM_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NAME": "test",
    "MASTER_ADDR": "127.0.0.1",
}


class FakeSlurm:
    """Programs in front of the PATH; `ends` are the answers of squeue, the last one repeated."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        self.answer("scontrol", f'echo "$@" >> {folder}/requeued')
        self.ends("N/A")

    def answer(self, name: str, script: str) -> None:
        program = self.folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def ends(self, *answers: str) -> None:
        (self.folder / "ends").write_text("".join(f"{answer}\n" for answer in answers))
        self.answer(
            "squeue",
            f"cd {self.folder}; head -n 1 ends; [ $(wc -l < ends) -gt 1 ] && sed -i 1d ends; true",
        )

    @property
    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_NTASKS_PER_NODE", "MASTER_PORT"):  # set on the way, by us and Lightning
        monkeypatch.setenv(name, "1" if "NTASKS" in name else "29507")
    return FakeSlurm(tmp_path_factory.mktemp("bin"), monkeypatch)


def in_seconds(seconds: float) -> str:
    return (datetime.datetime.now() + datetime.timedelta(seconds=seconds)).isoformat()


def losses(run: Path) -> dict[int, str]:
    rows = csv.DictReader((run / "csv" / "metrics.csv").open())
    return {int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]}


@pytest.mark.slow
def test_time_limit_requeues_and_the_restart_resumes_exactly(
    ic: Callable[..., int], slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ic(*RUN, "run_id=whole") == 0
    assert slurm.requeued == []
    run = tmp_path / "runs/debug/job"
    slurm.ends(in_seconds(170))  # within the default margin of 180 s
    assert ic(*RUN) == 0
    assert slurm.requeued == ["requeue 7"]
    assert os.readlink(run / "checkpoints/last") == "step=1"
    assert not (run / "passkey/heatmap.png").exists()
    assert not (run / "results.json").exists()

    slurm.ends(in_seconds(3600))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ic(*RUN) == 0
    assert slurm.requeued == ["requeue 7"]
    assert losses(run) == losses(tmp_path / "runs/debug/whole")
    assert sorted(losses(run)) == list(range(5))
    assert (run / "passkey/heatmap.png").is_file()


def test_an_extended_time_limit_counts(
    ic: Callable[..., int], slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.ends(in_seconds(100), in_seconds(3600))
    assert ic(*RUN) == 0
    assert slurm.requeued == []
    assert os.readlink(tmp_path / "runs/debug/job/checkpoints/last") == "step=5"


@pytest.mark.parametrize(("margin_s", "requeued"), [(600, []), (7200, ["requeue 7"])])
def test_the_margin_decides(
    ic: Callable[..., int], slurm: FakeSlurm, margin_s: int, requeued: list[str]
) -> None:
    slurm.ends(in_seconds(3600))
    assert ic(*RUN, f"callbacks.requeue.margin_s={margin_s}") == 0
    assert slurm.requeued == requeued


def test_without_squeue_only_signals_requeue(
    ic: Callable[..., int], slurm: FakeSlurm, recwarn: pytest.WarningsRecorder
) -> None:
    slurm.answer("squeue", "echo slurm_load_jobs error >&2; exit 1")
    assert ic(*RUN) == 0
    assert any("slurm_load_jobs error" in str(warning.message) for warning in recwarn)


def test_stops_with_a_checkpoint_at_the_cap(
    ic: Callable[..., int],
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slurm.ends(in_seconds(1))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert ic(*RUN, "callbacks.requeue.max_restarts=2") == 75
    assert slurm.requeued == []
    assert any(
        "2 restarts reach callbacks.requeue.max_restarts=2" in str(w.message) for w in recwarn
    )
    assert (tmp_path / "runs/debug/job/checkpoints/last/trainer.pt").is_file()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert ic(*RUN, "callbacks.requeue.max_restarts=2") == 2
    assert "job 7 has been restarted 3 times" in capsys.readouterr().err


def test_a_refused_requeue_is_an_error(
    ic: Callable[..., int], slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.ends(in_seconds(1))
    slurm.answer("scontrol", "echo Requested operation is presently disabled >&2; exit 1")
    handler = signal.getsignal(signal.SIGTERM)
    assert ic(*RUN) == 2
    error = capsys.readouterr().err
    assert "presently disabled. The checkpoint is saved; submit again" in error
    assert (tmp_path / "runs/debug/job/checkpoints/last/trainer.pt").is_file()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_sigterm_saves_and_stops_without_a_requeue(
    ic: Callable[..., int], slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `scancel` and a preemption send it; here it comes while the first step is taken."""
    slurm.answer("squeue", "kill -TERM $PPID; echo N/A")
    handler = signal.getsignal(signal.SIGTERM)
    assert ic(*RUN) == 143
    folder = tmp_path / "runs/debug/job"
    said = f"terminated; the checkpoint is saved, continue with fit run={folder}\n"
    assert said in capsys.readouterr().err
    assert slurm.requeued == []
    assert os.readlink(tmp_path / "runs/debug/job/checkpoints/last") == "step=1"
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGUSR1, 75, "stopped by a signal; continue with fit run="),
        (signal.SIGINT, 130, "interrupted; continue with fit run="),
    ],
)
def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step(
    tmp_path: Path, number: int, code: int, said: str
) -> None:
    """Two gloo processes of Lightning's own launcher, without SLURM."""
    command = [
        sys.executable,
        "-m",
        "ic",
        *RUN,
        "trainer.devices=2",
        "strategy=ddp",
        "trainer.max_steps=2000",
        "trainer.val_check_interval=5000",
        "callbacks.requeue.margin_s=0",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 1/"):
            break
    (rank_1,) = (
        child
        for child in psutil.Process(running.pid).children()
        if child.environ().get("LOCAL_RANK") == "1"
    )
    rank_1.send_signal(number)
    output = running.communicate()[0]
    assert running.returncode == code, output
    assert said in output
    checkpoints = tmp_path / "runs/debug/job/checkpoints"
    (folder,) = checkpoints.glob("step=*")
    assert os.readlink(checkpoints / "last") == folder.name
    step = int(folder.name.removeprefix("step="))
    assert 1 <= step < 2000
    assert max(losses(tmp_path / "runs/debug/job")) == step - 1
    assert "validation at step" not in output


def test_the_strongest_wish_counts() -> None:
    callback = SlurmRequeue(SlurmRequeueOptions())
    callback._on_signal(signal.SIGTERM, None)
    callback._on_signal(signal.SIGUSR1, None)
    assert callback._wanted is Stop.TERMINATE
    assert not callback.interrupted


@pytest.mark.parametrize(
    ("layout", "tasks"), [("1", 1), ("8(x4)", 8), ("2(x1)", 2)], ids=lambda value: str(value)
)
def test_reads_the_layout(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, layout: str, tasks: int
) -> None:
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", layout)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "4")
    assert SlurmJob.current() == SlurmJob("7", num_nodes=4, tasks_per_node=tasks, restart_count=0)


def test_refuses_an_uneven_layout(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1")
    with pytest.raises(SlurmError, match=r"different numbers of tasks \(2,1\); submit with"):
        SlurmJob.current()


@pytest.mark.parametrize(
    "verb", [RUN, ("evaluate", "checkpoint=nowhere", "accelerator=cpu")], ids=lambda verb: verb[0]
)
def test_without_srun_nobody_waits(
    ic: Callable[..., int],
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    verb: tuple[str, ...],
) -> None:
    """python straight in a batch script with two tasks: the second rank is never started."""
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere/config.json").write_text("{}")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2")
    assert ic(*verb) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ic: job 7 has 2 tasks, but srun did not start this process")
    assert "write `srun python -m ic ...`" in line
    assert not (tmp_path / "runs").exists()


def test_torchrun_in_a_job_gives_the_ranks(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert SlurmJob.current() is None


def test_an_interactive_shell_is_no_job(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert SlurmJob.current() is None


@pytest.mark.parametrize("changes", [{"margin_s": -1.0}, {"max_restarts": -1}])
def test_refuses(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"callbacks.requeue.{next(iter(changes))}=-1"):
        SlurmRequeueOptions(**changes)


def test_without_checkpoints_a_job_is_told(ic: Callable[..., int], slurm: FakeSlurm) -> None:
    options = ("callbacks.checkpoint=null", "callbacks.passkey=null", "trainer.max_steps=1")
    with pytest.warns(UserWarning, match="cannot be requeued"):
        assert ic(*RUN, *options) == 0
