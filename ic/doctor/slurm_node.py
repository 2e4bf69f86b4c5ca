"""This machine as a node of SLURM: its daemon, its state, its GPUs, and what fences jobs in."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ic.doctor.ask import call, not_here, stopped, unit
from ic.doctor.check import Finding

PLAYBOOK = "setup_slurm.yml"


def node() -> Iterator[Finding]:
    """Nothing is said of a machine that has SLURM's commands alone."""
    state = unit("slurmd")
    if state is None:
        yield not_here("slurmd", PLAYBOOK)
        return
    if finding := stopped("slurmd", "slurmd", state, PLAYBOOK):
        yield finding
        return
    yield Finding("slurmd", "ok", "runs")
    name = socket.gethostname().split(".")[0]
    shown = call("scontrol", "show", "node", name, "--oneliner")
    if shown.returncode == 0:
        yield node_state(name, shown.stdout)
        if shutil.which("nvidia-smi") is not None:
            seen = len(call("nvidia-smi", "--list-gpus").stdout.splitlines())
            yield node_gpus(shown.stdout, seen)
    configuration = call("scontrol", "show", "config").stdout
    if configuration:
        yield cgroups(configuration, Path("/proc/mounts").read_text())


def node_state(name: str, shown: str) -> Finding:
    """`scontrol show node`: whether it takes jobs, and why not."""
    what = f"node {name}"
    state = re.search(r"\bState=(\S+)", shown)
    found = state[1] if state else "unknown"
    if re.search(r"DOWN|DRAIN|FAIL|INVAL|NOT_RESPONDING|UNKNOWN|unknown", found):
        reason = re.search(r"\bReason=(.+?)(?: \[\S+\])?(?: \w+=|$)", shown, re.M)
        return Finding(
            what,
            "warn",
            f"{found}: {reason[1].strip()}" if reason else found,
            f"mend the reason, then scontrol update NodeName={name} State=RESUME; "
            f"ansible/{PLAYBOOK} repairs its configuration",
        )
    return Finding(what, "ok", found)


def node_gpus(shown: str, seen: int) -> Finding:
    """The GPUs that SLURM hands out here, against those that the driver sees."""
    total = re.search(r"\bGres=(\S+)", shown)
    counts = re.findall(r"gpu(?::[^:,()]+)?:(\d+)", total[1] if total else "")
    configured = sum(map(int, counts))
    found = f"SLURM hands out {configured} of {seen} GPUs"
    if configured == seen:
        return Finding("GPUs of the node", "ok", found)
    fix = f"ansible/{PLAYBOOK} reads the GPUs anew"
    return Finding("GPUs of the node", "fail", found, fix)


def cgroups(configuration: str, mounts: str) -> Finding:
    """Whether jobs are fenced in by cgroups: their memory, processors and GPUs.

    Args:
        configuration: of `scontrol show config`.
        mounts: content of /proc/mounts.
    """
    values = dict(re.findall(r"^(\w+)\s*= (.*)$", configuration, re.M))
    plugins = f"{values.get('TaskPlugin', '').strip()}, {values.get('ProctrackType', '').strip()}"
    fix = f"a kernel with cgroup2, then ansible/{PLAYBOOK}"
    if not re.search(r"^\S+ \S+ cgroup2 ", mounts, re.M):
        found = "no cgroup2 file system: a job can take all memory and all GPUs"
        return Finding("cgroups of SLURM", "warn", found, fix)
    if "task/cgroup" not in plugins:
        found = f"not used ({plugins}): a job can take all memory and all GPUs"
        return Finding("cgroups of SLURM", "warn", found, fix)
    if values.get("ConstrainDevices", "yes").strip() != "yes":
        found = "ConstrainDevices=no: a job sees the GPUs of others"
        return Finding("cgroups of SLURM", "warn", found, f"ansible/{PLAYBOOK} sets it")
    return Finding("cgroups of SLURM", "ok", plugins)
