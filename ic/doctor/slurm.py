"""The cluster's SLURM as the requeue needs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

from ic.doctor.check import Finding

TIMEOUT_S = 30
GOOD_KILL_WAIT_S = 5


def controller() -> Iterator[Finding]:
    """slurmctld, its settings, the partitions and munge; one line where there is no SLURM."""
    if shutil.which("scontrol") is None:
        yield Finding(
            "SLURM",
            "warn",
            "no scontrol: not a machine of a SLURM cluster",
            "sbatch files need one; everything else works without",
        )
        return
    ping = _call("scontrol", "ping")
    if ping.returncode or "UP" not in ping.stdout:
        said = " ".join((ping.stdout + ping.stderr).split())
        if "configuration source" in said:
            yield Finding(
                "SLURM",
                "warn",
                "its commands are installed, but not configured",
                "on a cluster set SLURM_CONF or copy /etc/slurm/slurm.conf; elsewhere nothing",
            )
            return
        yield Finding(
            "slurmctld",
            "fail",
            said or "no answer",
            "check SLURM_CONF, the network to the controller, and that slurmctld runs",
        )
    else:
        yield Finding("slurmctld", "ok", ping.stdout.strip().splitlines()[0])
        configuration = _call("scontrol", "show", "config").stdout
        yield from settings(configuration)
        yield from partitions(_call("scontrol", "show", "partition", "--oneliner").stdout)
        socket = re.search(r"^AuthInfo\s*=.*socket=([^,\s]+)", configuration, re.M)
        yield munge(f"--socket={socket[1]}" if socket else None)
        return
    yield munge()


def settings(text: str) -> Iterator[Finding]:
    """`scontrol show config`: may jobs be requeued, and is there time to end?"""
    values = dict(re.findall(r"^(\w+)\s*= (.*)$", text, re.M))
    if values.get("JobRequeue", "").strip() == "1":
        yield Finding("JobRequeue", "ok", "1")
    else:
        yield Finding(
            "JobRequeue",
            "warn",
            values.get("JobRequeue", "unknown").strip(),
            "our sbatch files ask with --requeue; for others set JobRequeue=1",
        )
    wait = values.get("KillWait", "").split()
    seconds = int(wait[0]) if wait else 0
    if seconds < GOOD_KILL_WAIT_S:
        yield Finding(
            "KillWait",
            "warn",
            f"{seconds} s",
            f"a process needs time to end after SIGTERM: at least {GOOD_KILL_WAIT_S} s",
        )
    else:
        yield Finding("KillWait", "ok", f"{seconds} s")


def partitions(text: str) -> Iterator[Finding]:
    """`scontrol show partition`: state and time limit of each."""
    for line in text.splitlines():
        values = dict(re.findall(r"(\w+)=(\S+)", line))
        what = f"partition {values.get('PartitionName', '?')}"
        found = (
            f"{values.get('State')}, {values.get('TotalNodes')} nodes, "
            f"at most {values.get('MaxTime')}"
        )
        if values.get("State") != "UP":
            yield Finding(what, "warn", found, "scontrol update PartitionName=... State=UP")
        else:
            yield Finding(what, "ok", found)


def munge(option: str | None = None) -> Finding:
    """A credential made and read here, over the socket that SLURM uses."""
    if shutil.which("munge") is None:
        return Finding("munge", "warn", "no munge command", "install munge where jobs start")
    options = [] if option is None else [option]
    made = _call("munge", "-n", *options)
    read = _call("unmunge", *options, given=made.stdout)
    if made.returncode or read.returncode:
        said = (made.stderr or read.stderr or read.stdout).strip().splitlines()
        return Finding(
            "munge",
            "fail",
            said[0] if said else "fails",
            "start munged, and give every node the same /etc/munge/munge.key",
        )
    return Finding("munge", "ok", "credential made and read")


def _call(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {TIMEOUT_S} s")
