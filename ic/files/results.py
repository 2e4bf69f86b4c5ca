"""Results files: what was measured, by which command, on what, from which commit."""

from __future__ import annotations

import datetime
import enum
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ic.files.atomic_write import write_json
from ic.files.publishable import publishable, published_command

_STATUS = ("status", "--porcelain", "-uno", "--", ".", ":(exclude)docs/results")


class RunStatus(enum.StrEnum):
    """What the results file of a run says about the run."""

    FINISHED = "finished"
    TRAINING = "training goes on"
    EVALUATION_INCOMPLETE = "evaluation incomplete"


def write_results(
    path: Path,
    config: dict[str, Any],
    rows: list[dict[str, Any]],
    command: str | None = None,
    shown: dict[str, Any] | None = None,
    public: bool = False,
) -> None:
    """Write `describe_run` and `rows`, whose keys name units; a suite says how it is `shown` in a
    report.
    """
    said: dict[str, Any] = {} if shown is None else {"shown": shown}
    write_json(path, {**describe_run(config, command, public), **said, "rows": rows})


def results_of_run(
    config: dict[str, Any], rows: list[dict[str, Any]], status: RunStatus
) -> dict[str, Any]:
    """What the results file of a run holds: `describe_run`, its status and `rows`."""
    return {**describe_run(config), "status": status.value, "rows": rows}


def set_status(path: Path, status: RunStatus) -> None:
    """Change what a run's results say about the run, if there are any; the rest stays."""
    if results := read_json(path):
        write_json(path, {**results, "status": status.value})


def is_finished(path: Path) -> bool:
    """Whether a run's results are all of it: trained to its end, and evaluated."""
    results = read_json(path)
    # Earlier versions wrote the file once a run had ended, and no status.
    return bool(results) and results.get("status", RunStatus.FINISHED) == RunStatus.FINISHED


def describe_run(
    config: dict[str, Any], command: str | None = None, public: bool = False
) -> dict[str, Any]:
    """`{command, commit, date, device, versions, config}`: what it takes to repeat a measurement.

    Args:
        command: for what was not started as a verb.
        public: the file is to be published: command and configuration name files and folders
            without where they lay on this machine (`ic.files.publishable`).
    """
    import torch  # late: verbs that only read results, or print their help, do without it

    command = command or "python -m ic " + shlex.join(sys.argv[1:])
    if public:
        command, config = published_command(command), publishable(config)
    return {
        "command": command,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": {
            "python": platform.python_version(),
            "torch": _installed("torch"),
            "cuda": torch.version.cuda,
            "triton": _installed("triton"),
            "lightning": _installed("lightning"),
            "transformers": _installed("transformers"),
        },
        "config": config,
    }


def commit() -> str:
    """The checkout's commit, with `+changes` if files differ; IC_COMMIT where there is no git.

    Files below docs/results do not count: a measurement that takes hours writes them as it goes.
    """
    if given := os.environ.get("IC_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"  # installed, in an environment that lies in another repository
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(root, *_STATUS) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device() -> str:
    """Name of the GPU, or of the processor and its number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}
