"""Marks in time, and the seconds between them, without stopping a GPU at each mark.

A GPU runs behind the program: when a hook runs on the host, the step's kernels are still queued.
Reading the host's clock there measures how fast work is queued; synchronising first costs the
overlap that makes training fast. So on CUDA a mark is an event in the stream, which takes its time
when the GPU gets there, and the times are read every few steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class StepTimer(Protocol):
    """Marks are opaque.

    `settle` waits until the device has passed a mark; `seconds` is for marks up to a settled one.
    `is_free` says that settling never waits.
    """

    name: str
    is_free: bool

    def mark(self) -> Any: ...
    def settle(self, mark: Any) -> None: ...
    def seconds(self, begin: Any, end: Any) -> float: ...


class HostTimer:
    """The host's clock: exact on CPU, where a step has ended when the hook runs."""

    name = "host clock"
    is_free = True

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def mark(self) -> float:
        return self._clock()

    def settle(self, mark: float) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaTimer:
    """Events in the current stream of one GPU."""

    name = "CUDA events"
    is_free = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def settle(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000
