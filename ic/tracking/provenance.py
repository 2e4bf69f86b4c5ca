"""Where a run comes from, for whoever reads of it elsewhere."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic.files.results import describe_run

# What SLURM says of the job; of each start its own.
_SLURM = {
    "SLURM_JOB_ID": "job_id",
    "SLURM_ARRAY_JOB_ID": "array_job_id",
    "SLURM_ARRAY_TASK_ID": "array_task_id",
    "SLURM_JOB_NAME": "job_name",
    "SLURM_JOB_PARTITION": "partition",
    "SLURM_JOB_NODELIST": "nodes",
    "SLURM_RESTART_COUNT": "restarts",
}
_MOST_DIFF_BYTES = 2**20


@dataclass(frozen=True)
class Provenance:
    """A start of a run, told to trackers as it begins.

    Attributes:
        config: the run's whole configuration.
        facts: stage, command, commit, date, device, versions; `gpus` and `slurm` if there are any.
        diff: what the checkout has changed since the commit; empty for none.
    """

    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    diff: str

    @property
    def tags(self) -> dict[str, str]:
        """The facts in short, by names such as `slurm.job_id`."""
        flat = flatten(self.facts)
        return {name: value for name, value in flat.items() if not name.startswith("versions.")}


def provenance(config: Mapping[str, Any], stage: str, with_diff: bool) -> Provenance:
    """Of this process.

    Args:
        stage: what the run does, in a word.
        with_diff: whether uncommitted changes may leave this machine.
    """
    import torch

    facts = {"stage": stage, **describe_run({})}
    del facts["config"]
    facts["gpus"] = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    facts["slurm"] = {name: os.environ[key] for key, name in _SLURM.items() if key in os.environ}
    return Provenance(config, facts, _diff() if with_diff else "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"model.hidden_size": "64"}`: leaves of nested tables as text, lists as one text each."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{name}"] = ", ".join(map(str, value))
        else:
            flat[f"{prefix}{name}"] = "null" if value is None else str(value)
    return {name: value for name, value in flat.items() if value}


def _diff() -> str:
    """What tracked files differ in from the commit; empty where there is no checkout of ours."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "diff", "HEAD", "--", ".", ":(exclude)docs/results"]
    try:
        found = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    text = found[:_MOST_DIFF_BYTES].decode(errors="replace")
    return text + ("\n(cut off here)\n" if len(found) > _MOST_DIFF_BYTES else "")
