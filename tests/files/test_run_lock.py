"""One process at a time in a run's folder; one that has died does not keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ic.files import run_lock
from ic.files.run_folder import RunFolder
from ic.files.run_lock import STALE_S, Holder, RunInUseError, locked
from tests.conftest import SHORT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs/a/b")


def leave(run: RunFolder, holder: Holder, *, silent_s: float = 0) -> None:
    """A lock that its holder touched last so long ago."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.lock.write_text(json.dumps(asdict(holder)))
    then = time.time() - silent_s
    os.utime(run.lock, (then, then))


def take(run: RunFolder) -> None:
    with locked(run):
        assert Holder(**json.loads(run.lock.read_text())) == replace(
            Holder.me(), since=json.loads(run.lock.read_text())["since"]
        )


def elsewhere(**changes: object) -> Holder:
    return replace(Holder.me(), host="node7", boot="another", **changes)


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_fit_is_refused_before_it_writes(
    ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "runs/debug/default")
    with locked(run):
        assert ic(*SHORT) == 2
        assert [path.name for path in run.path.iterdir()] == [".lock"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"ic: {run.path} is in use by process {os.getpid()} on " in error
    assert error.endswith("wait for its end, stop it, or choose another run_id=\n")


def test_a_run_that_ends_leaves_no_lock(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(run):
        (run.path / "kept").write_text(str(1 // int(not run.lock.is_file())))
    assert list(tmp_path.iterdir()) == []
    with locked(run):
        (run.path / "kept").touch()
    assert [path.name for path in run.path.iterdir()] == ["kept"]
    take(run)
    take(RunFolder(tmp_path / "other/x/y"))  # nothing was written there
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_dead_process_does_not_keep_its_run(run: RunFolder) -> None:
    me = Holder.me()
    dead = ended_process()
    for holder in (replace(me, pid=dead), replace(me, started=0)):  # the id is another's by now
        leave(run, holder)
        take(run)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    leave(run, replace(me, pid=zombie.pid, started=run_lock._start_of(os.getpid())))
    take(run)
    zombie.wait()


def test_a_live_process_keeps_its_run_however_silent(run: RunFolder) -> None:
    """As one that stands still for an hour, because a debugger holds it."""
    leave(run, Holder.me(), silent_s=3600)
    with pytest.raises(RunInUseError, match="in use by process"):
        take(run)


def test_another_host_is_known_by_its_touch(run: RunFolder) -> None:
    leave(run, elsewhere(), silent_s=STALE_S - 100)
    before = run.lock.read_text()
    with pytest.raises(
        RunInUseError, match=r"on node7, since .* \(last seen 20[01] s ago; if it is"
    ):
        take(run)
    assert run.lock.read_text() == before
    leave(run, elsewhere(), silent_s=STALE_S + 1)
    take(run)


def test_a_requeued_job_takes_over_at_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for job, restarts in (("7", 2), ("8", 1)):  # another process of this job, and another job
        leave(run, elsewhere(job_id=job, restarts=restarts))
        with pytest.raises(RunInUseError, match=f"of job {job} on node7"):
            take(run)
    leave(run, elsewhere(job_id="7", restarts=1))
    take(run)


def test_a_lock_without_a_holder(run: RunFolder) -> None:
    """Where files cannot be linked, a crash may leave one that is empty."""
    leave(run, elsewhere())
    run.lock.write_text("")
    with pytest.raises(RunInUseError, match="in use by a process that has just started"):
        take(run)
    os.utime(run.lock, (0, 0))
    take(run)


def test_without_hard_links(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    take(run)
    with locked(run), pytest.raises(RunInUseError, match="in use"):
        take(run)
    leave(run, replace(Holder.me(), pid=ended_process()))
    take(run)


def test_one_of_many_gets_a_dead_ones_lock(run: RunFolder) -> None:
    leave(run, replace(Holder.me(), pid=ended_process()))
    code = (
        "import sys; from ic.files.run_lock import locked; "
        "from ic.files.run_folder import RunFolder; sys.stdin.readline()\n"
        f"with locked(RunFolder({str(run.path)!r})): print('mine', flush=True); sys.stdin.read()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    # The one that has it ends only once its input does.
    losers = 0
    deadline = time.monotonic() + 120
    while losers < 7 and time.monotonic() < deadline:
        losers = sum(process.poll() is not None for process in processes)
        time.sleep(0.01)
    outputs = [process.communicate() for process in processes]
    assert sorted(out for out, _ in outputs) == [""] * 7 + ["mine\n"]
    assert sum("in use by process" in err for _, err in outputs) == 7


def test_the_holder_touches_its_lock(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.001)
    with locked(run):
        os.utime(run.lock, (0, 0))
        deadline = time.monotonic() + 60
        while run.lock.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert run.lock.stat().st_mtime > 0


def test_a_process_whose_run_was_taken_over_ends_at_once(run: RunFolder) -> None:
    """It stood still, was taken for dead, and wakes up."""
    code = (
        "import sys; from ic.files import run_lock; from ic.files.run_folder import RunFolder\n"
        "run_lock.BEAT_S = 0.001\n"
        f"with run_lock.locked(RunFolder({str(run.path)!r})):\n"
        "    print('mine', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    new = run.lock.with_name("new")
    new.write_text(json.dumps(asdict(elsewhere())))
    new.replace(run.lock)
    assert process.wait(60) == 2
    assert process.stderr is not None
    assert "was taken over by another process" in process.stderr.read()
    assert json.loads(run.lock.read_text())["host"] == "node7"
