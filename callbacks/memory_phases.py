"""Peaks of a memory counter by phase, and what held the memory at each peak.

The numbers, exactly:

- A phase's **peak** is the largest value of the device's counter between the phase's ends: on CUDA
  the bytes in live tensors by the caching allocator, exact, read without waiting for the GPU
  because its counters follow the order of allocation on the host; on CPU the process's resident
  memory (see `ProcessMeter` for what that is worth).
- **parameters** (buffers included), **gradients** and **optimizer** are the bytes of their tensors'
  distinct storages on the device, at the phase's end. Tied weights count once, a DTensor counts its
  local shard. Gradients are those alive at the peak: Lightning frees the last step's after
  `training_step`, so they are there all through `forward`; in `backward` a hook sees, at each new
  gradient, whether the peak has risen.
- **cache** is what the phase's user reported through `Phase.record_cache`, the largest report.
- **other** is what the counter showed when the phase began, beyond all of the above: the batch,
  library workspaces; on CPU the interpreter and freed pages as well. `backward` takes over
  `forward`'s.
- **activations** is the rest of the peak: saved activations, temporaries and whatever else the
  phase allocated. It is a difference, not a count, and never below zero.
- `host_rss_bytes` is the largest reading at a phase's end, `host_peak_rss_bytes` the process's peak
  counter (on CPU reset at each phase, on CUDA the peak since the process started).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ic.callbacks.memory_accounting import (
    MemoryMeter,
    host_peak_rss_bytes,
    host_rss_bytes,
    storage_bytes,
)


@dataclass
class PhaseRecord:
    """One phase as it is written: peaks over all its measurements, the split of the highest one."""

    num_measured: int = 0
    step: int = 0
    context_length_tokens: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    host_rss_bytes: int = 0
    host_peak_rss_bytes: int = 0
    split_of_bytes: int = -1
    split_bytes: dict[str, int] = field(default_factory=dict)

    def joined(self, later: PhaseRecord | None) -> PhaseRecord:
        """The record of both: all measurements, the larger peaks, the split of the highest."""
        if later is None:
            return self
        highest = later if later.split_of_bytes > self.split_of_bytes else self
        return replace(
            highest,
            num_measured=self.num_measured + later.num_measured,
            peak_allocated_bytes=_larger(self.peak_allocated_bytes, later.peak_allocated_bytes),
            peak_reserved_bytes=_larger(self.peak_reserved_bytes, later.peak_reserved_bytes),
            host_rss_bytes=max(self.host_rss_bytes, later.host_rss_bytes),
            host_peak_rss_bytes=max(self.host_peak_rss_bytes, later.host_peak_rss_bytes),
        )


def _larger(first: int | None, second: int | None) -> int | None:
    return max((value for value in (first, second) if value is not None), default=None)


class Phase:
    """A phase that is being measured."""

    def __init__(self, name: str, other_bytes: int | None = None) -> None:
        self.name = name
        self.other_bytes = other_bytes
        self.cache_bytes = 0
        self.gradient_bytes = 0

    def record_cache(self, cache: Any) -> None:
        """Report a cache at its largest: anything with `nbytes`, a number or a method."""
        nbytes = cache.nbytes() if callable(cache.nbytes) else cache.nbytes
        self.cache_bytes = max(self.cache_bytes, int(nbytes))


class PhaseRecorder:
    """Keeps the stack of open phases; only the innermost is measured.

    Args:
        meter: the device's counter.
        held: bytes of parameters, gradients and optimizer now.
    """

    def __init__(self, meter: MemoryMeter, held: Callable[[], dict[str, int]]) -> None:
        self.meter = meter
        self.held = held
        self.records: dict[str, PhaseRecord] = {}
        self.run_peak_bytes = 0
        self.step = 0
        self.context_length_tokens: int | None = None
        self._stack: list[Phase] = []

    def enter(self, phase: Phase) -> Phase:
        if self._stack:
            self._measure(self._stack[-1])
        self._stack.append(phase)
        self._begin(phase)
        return phase

    def leave(self, phase: Phase) -> None:
        """Close `phase` and what was opened in it and not closed; no effect on a closed phase."""
        if phase not in self._stack:
            return
        self._measure(self._stack[-1])
        while self._stack.pop() is not phase:
            pass
        if self._stack:
            self._begin(self._stack[-1])

    def leave_all(self) -> None:
        if self._stack:
            self.leave(self._stack[0])

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for `add`."""
        return {
            "meter": self.meter.name,
            "run_peak_bytes": self.total_peak_bytes(),
            "records": {name: asdict(record) for name, record in self.records.items()},
        }

    def add(self, earlier: Mapping[str, Any]) -> None:
        """Add what earlier processes of the run measured, unless it was another kind of memory."""
        if earlier["meter"] != self.meter.name:
            return
        self.run_peak_bytes = max(self.run_peak_bytes, earlier["run_peak_bytes"])
        for name, fields_ in earlier["records"].items():
            self.records[name] = PhaseRecord(**fields_).joined(self.records.get(name))

    def total_peak_bytes(self) -> int:
        """The run's peak, over all phases and what lay between them."""
        self.run_peak_bytes = max(self.run_peak_bytes, self.meter.peak())
        return self.run_peak_bytes

    def _begin(self, phase: Phase) -> None:
        self.total_peak_bytes()
        self.meter.reset()
        held = self.held()
        phase.gradient_bytes = held["gradients"]
        if phase.other_bytes is None:
            phase.other_bytes = max(0, self.meter.current() - sum(held.values()))

    def _measure(self, phase: Phase) -> None:
        peak, reserved = self.meter.peak(), self.meter.peak_reserved()
        self.run_peak_bytes = max(self.run_peak_bytes, peak)
        record = self.records.setdefault(phase.name, PhaseRecord())
        record.num_measured += 1
        record.host_rss_bytes = max(record.host_rss_bytes, host_rss_bytes())
        record.host_peak_rss_bytes = max(record.host_peak_rss_bytes, host_peak_rss_bytes())
        if reserved is not None:
            record.peak_allocated_bytes = max(record.peak_allocated_bytes or 0, peak)
            record.peak_reserved_bytes = max(record.peak_reserved_bytes or 0, reserved)
        if peak <= record.split_of_bytes:
            return
        split = self.held() | {
            "gradients": phase.gradient_bytes,
            "cache": phase.cache_bytes,
            "other": phase.other_bytes or 0,
        }
        split["activations"] = max(0, peak - sum(split.values()))
        record.split_of_bytes, record.split_bytes = peak, split
        record.step, record.context_length_tokens = self.step, self.context_length_tokens


class GradientWatch:
    """Keeps `phase.gradient_bytes` at what was alive at the peak of a backward pass."""

    def __init__(
        self,
        meter: MemoryMeter,
        phase: Phase,
        parameters: Iterable[Parameter],
        device: torch.device,
    ) -> None:
        self._meter, self._phase, self._device = meter, phase, device
        self._peak = meter.peak()
        self._bytes = phase.gradient_bytes
        trained = [p for p in parameters if p.requires_grad]
        self._present = {id(p) for p in trained if p.grad is not None}
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._on_gradient) for p in trained
        ]

    def stop(self) -> None:
        self._look()
        for handle in self._handles:
            handle.remove()

    def _on_gradient(self, parameter: Tensor) -> None:
        # Look first: while the counter climbed to this peak, the new gradient was still a temporary
        # of autograd.
        self._look()
        if id(parameter) not in self._present:
            self._present.add(id(parameter))
            self._bytes += storage_bytes([parameter.grad], self._device)

    def _look(self) -> None:
        if (peak := self._meter.peak()) > self._peak:
            self._peak, self._phase.gradient_bytes = peak, self._bytes
