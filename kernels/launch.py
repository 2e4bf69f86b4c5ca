"""Launching Triton kernels from Python at the cost of the launch, not of the checks before it.

Two things cost more than a small kernel runs: PyTorch's way to a custom operator written in Python
(30 to 60 us, more with gradients), and Triton's own argument handling (10 to 25 us). So an entry
point asks `is_eager` and calls its launcher itself where nothing but the launch is wanted; the
operator of the same name serves compilation and everything that watches operators. And a launcher
keeps a `Launch` for each kind of input that it has checked, which keeps the compiled kernel.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# More kinds of input than a process meets, unless shapes that vary without end are in the keys.
MAX_LAUNCHES = 1024
_PLAIN = frozenset((Tensor, nn.Parameter))


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors is to compute and nothing else.

    Not so where PyTorch compiles, traces, transforms functionally or watches operators by a mode,
    nor on tensor subclasses and tensors without data.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for x in tensors:  # noqa: SIM110  # half the time of all()
        if x is not None and (type(x) not in _PLAIN or x.is_meta):
            return False
    return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors is to be recorded."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


class Launch:
    """A kernel with its constants, compiled at the first launch and from then on launched as it is.

    All launches must agree in everything by which Triton specialises: the dtypes of the tensors,
    and of each number whether it is 1, a multiple of 16 or beyond 32 bits, unless the kernel says
    `do_not_specialize`. A tensor that is not aligned to 16 bytes takes Triton's own way.

    Args:
        kernel: made by `triton.jit`, parameters in the order tensors, numbers, constants.
        constants: the kernel's constants by name.
        options: how to launch it: `num_warps` and others.
    """

    __slots__ = ("_compiled", "_constants", "_values", "kernel")

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self.kernel = kernel
        self._constants = constants | options
        first = len(kernel.arg_names) - len(constants)
        self._values = tuple(constants[name] for name in kernel.arg_names[first:])
        self._compiled: Any = None

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Any], numbers: Sequence[int | float]
    ) -> None:
        """`tensors` may hold None and tensor descriptors."""
        pointers, bits = [], 0
        for x in tensors:
            if isinstance(x, Tensor):
                pointer = x.data_ptr()
                bits |= pointer
                pointers.append(pointer)
            else:
                pointers.append(x)
        if self._compiled is not None and not bits & 15:
            self._compiled[grid](*pointers, *numbers, *self._values)
            return
        compiled = self.kernel[grid](*tensors, *numbers, **self._constants)
        if not bits & 15:
            self._compiled = compiled  # None in the interpreter


class Launches(dict[Hashable, Any]):
    """What was made ready for each kind of input: a `Launch`, or what holds one."""

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if len(self) >= MAX_LAUNCHES:
            self.clear()
        super().__setitem__(key, value)
