"""`python -m ic fit` in processes of their own, for verbs that compare runs or chain them.

Each process of `run_fits` leads a group, and the whole group is killed when the `fit` has ended,
takes too long or this process is told to stop: a rank or a data worker that outlives its first
process would keep its GPU from the next run.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.files.results import is_finished
from ic.files.run_folder import RunFolder

_LOG_TAIL_LINES = 20
_POLL_S = 0.1
# How a failed run names its reason: our one line, or the end of a traceback.
_REASON = re.compile(r"^(?:\[rank\d+\]: ?)?(ic: .*|[\w.]*(?:Error|Exception)\b.*)$", re.M)


@dataclass(frozen=True)
class FitJob:
    """A `fit` to run.

    Attributes:
        overrides: its arguments.
        log: file for what it prints.
    """

    overrides: Sequence[str]
    log: Path


@dataclass(frozen=True)
class FitOutcome:
    """How a `fit` ended.

    Attributes:
        reason: why it failed; None if it did not.
        wall_s: from the start of the process to its end.
        log_tail: the last lines of a failed run's log.
    """

    reason: str | None
    wall_s: float
    log_tail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TimeLimit:
    """Seconds that a `fit` may take, and the option that set them."""

    seconds: float
    option: str


def run_fits(
    jobs: Sequence[FitJob],
    places: Sequence[Mapping[str, str]],
    limit: TimeLimit,
    on_end: Callable[[int, FitOutcome], None],
) -> None:
    """Run all jobs, as many at a time as there are places, in order.

    Args:
        places: environment variables of the process that runs there, such as the GPU it sees.
        on_end: called with a job's index and outcome as each ends.

    Raises:
        KeyboardInterrupt: after SIGINT; the processes are gone by then.
        SystemExit: after SIGTERM, likewise.
    """
    waiting = list(enumerate(jobs))
    free = list(places)
    running: dict[int, tuple[_Process, Mapping[str, str]]] = {}
    with _stop_signals() as stop_if_asked:
        try:
            while waiting or running:
                while waiting and free:
                    index, job = waiting.pop(0)
                    place = free.pop(0)
                    running[index] = _Process(job, place), place
                for index, (process, place) in list(running.items()):
                    outcome = process.outcome(limit)
                    if outcome is not None:
                        del running[index]
                        free.append(place)
                        on_end(index, outcome)
                stop_if_asked()
                time.sleep(_POLL_S)
        finally:
            for process, _ in running.values():
                process.end()


def run_fit(job: FitJob, limit: TimeLimit) -> FitOutcome:
    """`run_fits` with a single job."""
    outcomes: list[FitOutcome] = []
    run_fits([job], [{}], limit, lambda _, outcome: outcomes.append(outcome))
    return outcomes[0]


def fit_unless_finished(title: str, run: RunFolder, overrides: Sequence[str]) -> int:
    """A `fit` that prints here, unless its run has its results already -> the exit code."""
    if is_finished(run.results):
        rank_zero_info(f"{title}: finished, see {run.path}")
        return 0
    rank_zero_info(f"{title}: python -m ic fit {' '.join(overrides)}")
    command = [sys.executable, "-m", "ic", "fit", *overrides]
    return subprocess.run(command, check=False).returncode


class _Process:
    def __init__(self, job: FitJob, place: Mapping[str, str]) -> None:
        self._log = job.log
        self._began_s = time.perf_counter()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ic", "fit", *job.overrides],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **place},
                start_new_session=True,
            )

    def outcome(self, limit: TimeLimit) -> FitOutcome | None:
        """None while it runs."""
        code = self._process.poll()
        wall_s = time.perf_counter() - self._began_s
        if code is None and wall_s < limit.seconds:
            return None
        self.end()
        if code == 0:
            return FitOutcome(None, wall_s)
        text = self._log.read_text(errors="replace")
        if code is None:
            reason = f"took longer than {limit.option}={limit.seconds:g}"
        else:
            named = _REASON.findall(text)
            reason = f"exit code {code}" + (f": {named[0]}" if named else "")
        return FitOutcome(reason, wall_s, text.splitlines()[-_LOG_TAIL_LINES:])

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM only set a flag; yields what raises where it is safe.

    An exception out of the handler could come between the start of a process and its entry in the
    list of those to end.
    """
    asked: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)

    def stop_if_asked() -> None:
        if signal.SIGTERM in asked:
            raise SystemExit(128 + signal.SIGTERM)
        if asked:
            raise KeyboardInterrupt

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_if_asked
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
