"""What a kernel's benchmark declares, and where it is declared.

A kernel's cases live in `kernels/benchmarks/<kernel>.py`. Each case names its shape, its inputs and
several ways to compute the same thing; `ic.kernels.benchmark_mla` checks, times and reports them.

    from ic.kernels.benchmark_registry import BenchmarkCase, register

    @register("rmsnorm")
    def cases() -> Iterable[BenchmarkCase]:
        yield BenchmarkCase(
            kernel="rmsnorm", name="16384 x 2048", config={"num_tokens": 16384, "dim": 2048},
            make_inputs=lambda device, seed: make_inputs(device, seed),
            ours=lambda inputs: lambda: triton_rmsnorm(inputs["x"], inputs["weight"]),
            reference=lambda inputs: rmsnorm_reference(inputs["x"].float(), inputs["weight"]),
            peers={"liger": prepare_liger}, bytes_moved=..., flops=0, tolerance=5e-3,
        )

An implementation is a *prepare* function: it takes one set of inputs, does what a serving system
does once (planning, padding, compiling) and returns the zero-argument call that is timed. A peer
whose package is missing raises ImportError in prepare and is reported as absent; one that cannot do
the shape raises NotImplementedError with the reason.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
Call = Callable[[], Any]
Prepare = Callable[[Inputs], Call]
CaseFactory = Callable[[], Iterable["BenchmarkCase"]]


@dataclass(frozen=True)
class BenchmarkCase:
    """One shape of one kernel. `bytes_moved` counts inputs read once and outputs written once.

    `first_output` picks the tensor that is compared with the reference out of what a call returns
    (a tensor, or the first of a tuple). `baseline` names an earlier case of the same kernel against
    which the speed-up is reported (an fp8 cache against the bf16 one, say). Those named in
    `launched_from_python` are timed that way only, never inside a CUDA graph.
    """

    kernel: str
    name: str
    config: Mapping[str, Any]
    make_inputs: Callable[[torch.device, int], Inputs]
    ours: Prepare
    reference: Callable[[Inputs], torch.Tensor]
    bytes_moved: int
    flops: int
    tolerance: float
    peers: Mapping[str, Prepare] = field(default_factory=dict)
    baseline: str | None = None
    launched_from_python: frozenset[str] = frozenset()
    tags: tuple[str, ...] = ()

    @staticmethod
    def first_output(result: Any) -> torch.Tensor:
        return result[0] if isinstance(result, (tuple, list)) else result


_FACTORIES: dict[str, CaseFactory] = {}


def register(kernel: str) -> Callable[[CaseFactory], CaseFactory]:
    """Register the function that yields the cases of `kernel`; it is called only when asked for."""

    def add(factory: CaseFactory) -> CaseFactory:
        if kernel in _FACTORIES:
            raise ValueError(f"kernel {kernel!r} is registered twice")
        _FACTORIES[kernel] = factory
        return factory

    return add


def load_kernels() -> list[str]:
    """Import every module of `ic.kernels.benchmarks` and return the registered kernels' names."""
    package = importlib.import_module("ic.kernels.benchmarks")
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"ic.kernels.benchmarks.{module}")
    return sorted(_FACTORIES)


def cases_of(kernel: str) -> list[BenchmarkCase]:
    """The cases of one kernel. Raises ValueError with the known names for an unknown one."""
    if kernel not in _FACTORIES:
        raise ValueError(f"kernel is {kernel!r}; known are {', '.join(sorted(_FACTORIES))}")
    return list(_FACTORIES[kernel]())
