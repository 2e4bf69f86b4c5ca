"""The jobs of a sweep, one after another, and a table of what they came to.

Each is a process of its own: a job that crashes takes nothing along, its ranks and its GPU memory
are gone when the next begins, and its results name the command that repeats it.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ic.config.compose import compose_config
from ic.config.sweep import SweepJob, run_id_suffix, short_names, sweep_jobs
from ic.config.typed_values import spell_values
from ic.errors import UsageError
from ic.files.atomic_write import write_json
from ic.files.results import is_finished, read_json
from ic.files.run_folder import RunFolder
from ic.terminal import is_first_process

# These name a folder already.
_NAME_A_FOLDER = ("run_id", "name", "output_dir")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Columns of the table that hold numbers, by the name of the JSON file.
_NUMBERS = {"train_loss": "loss", "val_loss": "val loss", "passkey_accuracy": "passkey"}
# Exit codes of a job that somebody stopped: EX_TEMPFAIL, and 128 + SIGHUP, SIGINT, SIGTERM.
_STOPPED = (75, 129, 130, 143)


@dataclass
class PlannedJob:
    """A job of a sweep.

    Attributes:
        swept: the swept keys, each with this job's value.
        arguments: of `python -m ic`, behind the verb.
        run: the folder that it trains in, or reads from; None where the verb has none.
        exit_code: None before it has ended.
    """

    swept: dict[str, str]
    arguments: list[str]
    run: RunFolder | None
    exit_code: int | None = None

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.swept.items())


def run_sweep(name: str, verb: ModuleType, overrides: Sequence[str]) -> int:
    """Check every job, run one after another, and show what they came to.

    A job that fails does not keep those after it; one that is stopped ends the sweep. `fit` leaves
    a table and, beside the folders of its runs, the same as JSON.

    Returns:
        The largest exit code of the jobs, or that of the one that was stopped.

    Raises:
        ValueError: a wrong key or value in any job, before the first begins.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError(
            "--multirun under torchrun: its processes meet once only; start torchrun for each "
            "job, or let trainer.devices= start the processes"
        )
    jobs = plan_jobs(name, verb, overrides)
    is_first = is_first_process()
    code, cut_short = 0, False
    with passing_signals_on() as run:
        for number, job in enumerate(jobs, 1):
            if is_first:
                print(f"sweep: job {number} of {len(jobs)}: {job}", file=sys.stderr, flush=True)
            job.exit_code, stopped = run([sys.executable, "-m", "ic", name, *job.arguments])
            code = max(code, job.exit_code)
            cut_short = stopped or job.exit_code in _STOPPED
            if cut_short or _is_to_go_on(name, job):
                code = job.exit_code
                break
    if is_first:
        _report(name, jobs)
        if name == "fit" and cut_short:
            print(f"sweep: {how_to_continue(overrides)}", file=sys.stderr)
    return code


def how_to_continue(overrides: Sequence[str]) -> str:
    """How a sweep of `fit` that ended early goes on: `last` would fail in a job not yet begun."""
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    change = "the same command"
    if "overwrite" in given:  # it would begin the finished jobs anew, too
        change += " without overwrite="
    return (
        f"continue with {change} and ckpt_path=auto"
        + (" in place of its ckpt_path=" if "ckpt_path" in given else "")
        + ": a job goes on from its last checkpoint, or begins where it has none"
    )


def plan_jobs(name: str, verb: ModuleType, overrides: Sequence[str]) -> list[PlannedJob]:
    """The jobs in order, each checked and with a folder of its own.

    Raises:
        ValueError: a wrong key or value in any of them.
    """
    jobs = sweep_jobs(overrides)
    complete = getattr(verb, "complete", list)
    spelled = [spell_values(verb.Config, job.overrides) for job in jobs]
    configs = [compose_config(name, verb.Config, list(complete(each)))[0] for each in spelled]
    if not hasattr(configs[0], "run_id"):
        return [PlannedJob(job.swept, job.overrides, None) for job in jobs]
    suffixes = _suffixes(jobs, configs)
    planned = []
    for job, config, suffix in zip(jobs, configs, suffixes, strict=True):
        config.run_id = ",".join(filter(None, (config.run_id, suffix)))
        given = [each for each in job.overrides if each.partition("=")[0] != "run_id"]
        arguments = [*given, f"run_id={config.run_id}"]
        planned.append(PlannedJob(job.swept, arguments, config.folder))
    return planned


def _suffixes(jobs: Sequence[SweepJob], configs: Sequence[Any]) -> list[str]:
    """What each job's run_id ends with, so that every job has a folder of its own.

    Raises:
        UsageError: two jobs are the same.
    """
    known = set(_NAME_A_FOLDER)
    if len({config.name for config in configs}) == len(
        {job.swept.get("experiment") for job in jobs}
    ):
        known.add("experiment")
    named = [{key: job.swept[key] for key in job.swept if key not in known} for job in jobs]
    for digest in (False, True):
        suffixes = [run_id_suffix(keys, digest=digest) if keys else "" for keys in named]
        folders = [
            (config.output_dir, config.name, config.run_id, suffix)
            for config, suffix in zip(configs, suffixes, strict=True)
        ]
        if len(set(folders)) == len(folders):
            return suffixes
    twice = next(
        job for job, folder in zip(jobs, folders, strict=True) if folders.count(folder) > 1
    )
    raise UsageError(f"--multirun: {twice.swept} is given twice; give each value once")


def _is_to_go_on(name: str, job: PlannedJob) -> bool:
    """Whether a `fit` ended well without its results: SLURM is to start the whole job again."""
    if name != "fit" or job.run is None:
        return False
    return job.exit_code == 0 and not is_finished(job.run.results)


@contextlib.contextmanager
def passing_signals_on() -> Iterator[Callable[[list[str]], tuple[int, bool]]]:
    """Yield what runs a command -> exit code, and whether a signal came; it reaches the command.

    The command leads a process group of its own, or a Ctrl-C on a terminal would reach it twice.
    """
    asked: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        for process in running:
            _send(process, signum)

    def run(command: list[str]) -> tuple[int, bool]:
        with subprocess.Popen(command, process_group=0) as process:
            running[:] = [process]
            for signum in asked:  # it came while the process was started
                _send(process, signum)
            code = process.wait()
            running.clear()
        return (code if code >= 0 else 128 - code), bool(asked)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield run
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen[bytes], signum: int) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)


def _report(name: str, jobs: Sequence[PlannedJob]) -> None:
    """The table of a sweep of `fit`, and its JSON file; of another verb, the jobs that failed."""
    if name != "fit":
        for job in jobs:
            if job.exit_code:
                print(f"sweep: {job}: exit code {job.exit_code}", file=sys.stderr)
        return
    rows = [sweep_row(job) for job in jobs]
    beside = Path(os.path.commonpath([os.path.dirname(row["folder"]) for row in rows]))
    file = beside / f"sweep-{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}.json"
    write_json(file, {"command": f"python -m ic {shlex.join(sys.argv[1:])}", "rows": rows})
    console = Console()
    console.print(sweep_table(rows, beside))
    console.print(f"sweep: {file}", soft_wrap=True, highlight=False)


def sweep_row(job: PlannedJob) -> dict[str, Any]:
    """What a job came to, as far as it came."""
    assert job.run is not None
    passkey = [
        row
        for row in read_json(job.run.results).get("rows", [])
        if row.get("what") == "passkey" and row.get("depth") != "control"
    ]
    asked = sum(row["n"] for row in passkey)
    ended = "not begun" if job.exit_code is None else f"exit code {job.exit_code}"
    return {
        "swept": job.swept,
        "ended": "finished" if job.exit_code == 0 and is_finished(job.run.results) else ended,
        "train_loss": last_value(job.run, "train/loss"),
        "val_loss": last_value(job.run, "val/loss"),
        "passkey_accuracy": sum(row["correct"] for row in passkey) / asked if asked else None,
        "folder": str(job.run.path),
    }


def last_value(run: RunFolder, metric: str) -> float | None:
    """The last value of a metric in the run's CSV file; None if it holds none."""
    if not run.metrics.is_file():
        return None
    with run.metrics.open(newline="") as lines:
        values = [row.get(metric) for row in csv.DictReader(lines)]
    return next((float(value) for value in reversed(values) if value), None)


def sweep_table(rows: Sequence[dict[str, Any]], beside: Path) -> Table:
    """The rows for a terminal, without columns that none fills; folders from `beside` on."""
    table = Table(title=f"sweep in {beside}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = short_names(list(rows[0]["swept"]))
    for name in names.values():
        table.add_column(name, overflow="fold")
    numbers = [name for name in _NUMBERS if any(row[name] is not None for row in rows)]
    table.add_column("ended")
    for name in numbers:
        table.add_column(_NUMBERS[name], justify="right")
    table.add_column("folder", overflow="fold")
    for row in rows:
        table.add_row(
            *row["swept"].values(),
            row["ended"],
            *("-" if row[name] is None else f"{row[name]:.4f}" for name in numbers),
            os.path.relpath(row["folder"], beside),
        )
    return table
