"""The cluster's SLURM as the requeue needs it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from ic.doctor.ask import call, not_here
from ic.doctor.check import Finding

GOOD_KILL_WAIT_S = 5
SIGNAL_S = 300  # before the time limit: `--signal` of slurm/*.sbatch


def controller(step_s: float | None = None) -> Iterator[Finding]:
    """slurmctld, its settings, the partitions and munge; one line where there is no SLURM.

    Args:
        step_s: seconds of a run's longest step, if one is known.
    """
    if shutil.which("scontrol") is None:
        yield not_here("SLURM", "setup_slurm.yml")
        return
    ping = call("scontrol", "ping")
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
            "check SLURM_CONF, the network to the controller, and that slurmctld runs; "
            "ansible/setup_slurm.yml starts it",
        )
    else:
        yield Finding("slurmctld", "ok", ping.stdout.strip().splitlines()[0])
        configuration = call("scontrol", "show", "config").stdout
        shown = call("scontrol", "show", "partition", "--oneliner").stdout
        yield from settings(configuration)
        yield from partitions(shown)
        if step_s is not None:
            yield from grace(configuration, shown, step_s)
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


def grace(configuration: str, shown: str, step_s: float) -> Iterator[Finding]:
    """Whether a job that is told to end can finish its step and save first.

    SIGTERM comes `KillWait` before SIGKILL at the time limit and from `scancel`; a preempted job of
    a partition has its `GraceTime` besides. A run answers at the end of a step.

    Args:
        configuration, shown: what `scontrol` shows of the cluster and of its partitions.
    """
    wait = re.search(r"^KillWait\s*= (\d+)", configuration, re.M)
    kill_wait_s = int(wait[1]) if wait else 0
    yield _grace("SIGTERM (KillWait)", kill_wait_s, step_s)
    for line in shown.splitlines():
        values = dict(re.findall(r"(\w+)=(\S+)", line))
        if values.get("PreemptMode", "OFF").startswith("OFF"):
            continue
        what = f"preemption in {values.get('PartitionName', '?')} (GraceTime)"
        yield _grace(what, int(values.get("GraceTime", "0")) + kill_wait_s, step_s)
    yield _grace("SIGUSR1 of our sbatch files (--signal)", SIGNAL_S, step_s)


def _grace(what: str, grace_s: int, step_s: float) -> Finding:
    # The signal may come at the beginning of a step; what is left over is for the save.
    found = f"{grace_s} s, and a step takes {step_s:.3g} s"
    if grace_s > 2 * step_s:
        return Finding(what, "ok", found)
    return Finding(
        what,
        "warn",
        f"{found}: a run may be killed before it has saved",
        f"sbatch --signal=USR1@{max(SIGNAL_S, round(3 * step_s))}, a shorter step "
        "(trainer.accumulate_grad_batches, data.tokens_per_batch), a larger KillWait or GraceTime, "
        "or a smaller callbacks.checkpoint.every_n_steps",
    )


def munge(option: str | None = None) -> Finding:
    """A credential made and read here, over the socket that SLURM uses."""
    if shutil.which("munge") is None:
        return Finding("munge", "warn", "no munge command", "install munge where jobs start")
    options = [] if option is None else [option]
    made = call("munge", "-n", *options)
    read = call("unmunge", *options, given=made.stdout)
    if made.returncode or read.returncode:
        said = (made.stderr or read.stderr or read.stdout).strip().splitlines()
        return Finding(
            "munge",
            "fail",
            said[0] if said else "fails",
            "start munged, and give every node the same key; ansible/setup_slurm.yml does both",
        )
    return Finding("munge", "ok", "credential made and read")
