"""Fits as processes of their own: where they run, why they failed, and that none outlives us."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from types import FrameType

import psutil
import pytest

from ic.studies.processes import FitJob, FitOutcome, TimeLimit, run_fits

NO_LIMIT = TimeLimit(math.inf, "some.option")


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def test_runs_in_its_place_and_says_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "logs/fit.txt"
    outcomes: dict[int, FitOutcome] = {}
    # With IC_TRACEBACK the command line lets an error through instead of one line and exit code 2.
    run_fits(
        [FitJob(["trainer.max_step=3"], log)],
        [{"IC_TRACEBACK": "1"}],
        NO_LIMIT,
        outcomes.__setitem__,
    )
    assert log.read_text().startswith("Traceback")
    last = log.read_text().splitlines()[-1]
    assert "unknown key 'trainer.max_step'; did you mean trainer.max_steps" in last
    assert outcomes[0].log_tail[-1] == last
    assert outcomes[0].reason is not None
    assert outcomes[0].reason.startswith("exit code 1: ")


def test_no_more_at_a_time_than_places(tmp_path: Path) -> None:
    jobs = [FitJob(["experiment=mla_tiny"], tmp_path / f"{i}.txt") for i in range(4)]
    ended: list[tuple[int, int]] = []

    def on_end(index: int, outcome: FitOutcome) -> None:
        assert outcome.reason == "took longer than some.option=0"
        started = sum((tmp_path / f"{i}.txt").exists() for i in range(4))
        ended.append((index, started))

    # Without any time each ends at the first look at it, when all the places are taken.
    before = psutil.Process().children()  # other tests leave processes that serve forks
    run_fits(jobs, [{}, {}], TimeLimit(0, "some.option"), on_end)
    assert ended == [(0, 2), (1, 2), (2, 4), (3, 4)]
    assert psutil.Process().children() == before


@pytest.mark.parametrize(
    ("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_them_all(
    tmp_path: Path, signum: signal.Signals, error: type[BaseException]
) -> None:
    others = psutil.Process().children()  # other tests leave processes that serve forks
    children: list[psutil.Process] = []

    def stop(alarm: int, frame: FrameType | None) -> None:
        children[:] = (child for child in psutil.Process().children() if child not in others)
        if len(children) == 2:
            os.kill(os.getpid(), signum)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0.1)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    jobs = [FitJob(["experiment=mla_tiny"], tmp_path / f"{i}.txt") for i in range(3)]
    try:
        with pytest.raises(error) as raised:
            run_fits(jobs, [{}, {}], NO_LIMIT, lambda index, outcome: pytest.fail("none has ended"))
    finally:
        signal.signal(signal.SIGALRM, previous)
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 143
    assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert not (tmp_path / "2.txt").exists()
    assert {s: signal.getsignal(s) for s in before} == before
