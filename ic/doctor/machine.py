"""Limits of the operating system that training runs into."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from ic.display.numbers import gib
from ic.doctor.check import Finding

GOOD_SHM_BYTES = 2 * 2**30
GOOD_OPEN_FILES = 4096
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room in /dev/shm, where data workers hand over batches."""
    if not folder.is_dir():
        yield Finding("shared memory", "warn", f"no {folder}", "data.num_workers=0")
        return
    free = shutil.disk_usage(folder).free
    found = f"{gib(free, 2)} free in {folder}"
    if free < GOOD_SHM_BYTES:
        yield Finding(
            "shared memory",
            "warn",
            found,
            "start the container with --shm-size=16g, remove old files there, or "
            "data.num_workers=0",
        )
    else:
        yield Finding("shared memory", "ok", found)


def limits() -> Iterator[Finding]:
    """Open files, and memory that may be locked (InfiniBand needs it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < GOOD_OPEN_FILES:
        yield Finding(
            "open files",
            "warn",
            f"{soft} (hard {hard})",
            f"ulimit -n {GOOD_OPEN_FILES}; under SLURM LimitNOFILE of slurmd",
        )
    else:
        yield Finding("open files", "ok", _shown(soft))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_rdma = any(Path("/sys/class/infiniband").glob("*"))
    if has_rdma and soft != resource.RLIM_INFINITY:
        yield Finding(
            "locked memory",
            "warn",
            _shown(soft),
            "InfiniBand needs ulimit -l unlimited; under SLURM LimitMEMLOCK of slurmd",
        )
    else:
        yield Finding("locked memory", "ok", _shown(soft))


def clock() -> Iterator[Finding]:
    """Whether the kernel's clock follows a time server; munge refuses skewed clocks."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))
    except AttributeError:
        yield Finding("clock", "warn", "cannot be asked on this system", "check that NTP runs")
        return
    if state == -1:
        reason = os.strerror(ctypes.get_errno())
        yield Finding("clock", "warn", f"cannot be asked: {reason}", "check that NTP runs")
    elif state == _TIME_ERROR:
        yield Finding(
            "clock",
            "warn",
            "not synchronised",
            "run chrony or systemd-timesyncd; munge refuses clocks 5 minutes apart",
        )
    else:
        yield Finding("clock", "ok", "synchronised")


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
