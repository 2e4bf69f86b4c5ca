"""Reading memory: bytes that tensors hold, what the CUDA allocator counts, what the process holds.

Everything here reads host-side counters: nothing waits for the GPU.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def storage_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Bytes of the distinct storages behind `tensors` on `device`.

    Views and tied weights count once, and a view counts its whole storage, because that is what
    stays in memory. A DTensor counts its local shard. A storage that FSDP has freed (resized to 0)
    counts 0. Memory the allocator adds by rounding a request up (512 bytes on CUDA) is not
    included.
    """
    seen: dict[int, int] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device != device or local.layout != torch.strided:
            continue
        storage = local.untyped_storage()
        if storage.nbytes():
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def optimizer_state(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Every tensor in the optimizers' state, however deeply nested."""
    for optimizer in optimizers:
        yield from _tensors_in(optimizer.state)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def host_rss_bytes() -> int:
    """Resident memory of this process now; outside Linux its peak, all that `resource` gives."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return host_peak_rss_bytes()


def host_peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started, or since the counter's reset."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class MemoryMeter(Protocol):
    """What the profiler asks of a device: bytes in use, and their peak since the last reset."""

    name: str

    def current(self) -> int: ...
    def peak(self) -> int: ...
    def peak_reserved(self) -> int | None: ...
    def reset(self) -> None: ...


class CudaMeter:
    """PyTorch's caching allocator on one GPU.

    `current` and `peak` are bytes in live tensors, `peak_reserved` what the allocator holds from
    the driver. Memory taken outside the allocator (CUDA context, NCCL buffers, cuBLAS handles) is
    in neither.
    """

    name = "cuda_allocator"

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # the counters cannot be reset before the allocator exists
        self.device = device

    def current(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def peak_reserved(self) -> int | None:
        return torch.cuda.max_memory_reserved(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class ProcessMeter:
    """Resident memory of this process: PyTorch has no allocation counter for the CPU.

    It includes the interpreter, the libraries and pages that the C allocator keeps after a free, so
    a difference of two readings is an estimate of what tensors took, not a count.

    Args:
        reset_peak: reset the kernel's peak counter (write 5 to /proc/self/clear_refs), so that each
            phase has its own peak. It also resets the VmHWM and ru_maxrss that others read from
            this process. Where it is off or not possible, a phase's peak is the largest reading at
            its two ends, unless the process's peak rose in it: a lower bound.
    """

    name = "process_rss"

    def __init__(self, reset_peak: bool = True) -> None:
        self.can_reset = reset_peak and _reset_peak_rss()
        self._lifetime_peak = host_peak_rss_bytes()
        self._start = host_rss_bytes()

    def current(self) -> int:
        return host_rss_bytes()

    def peak(self) -> int:
        peak = host_peak_rss_bytes()
        if self.can_reset or peak > self._lifetime_peak:
            return peak
        return max(self._start, host_rss_bytes())

    def peak_reserved(self) -> int | None:
        return None

    def reset(self) -> None:
        if self.can_reset:
            _reset_peak_rss()
        self._lifetime_peak = host_peak_rss_bytes()
        self._start = host_rss_bytes()


def memory_limit_bytes(device: torch.device) -> int:
    """What a process may use: the GPU's memory, or the host's within the limits of its cgroups."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()]
    with contextlib.suppress(OSError):  # no cgroups, or those of the first version
        own = _CGROUP.read_text().rpartition("::")[2].strip().lstrip("/")
        for group in (_CGROUPS / own, *(_CGROUPS / own).parents):
            with contextlib.suppress(OSError, ValueError):  # the root has no limit, others "max"
                limits.append(int((group / "memory.max").read_text()))
    return min(limits)


def _reset_peak_rss() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True
