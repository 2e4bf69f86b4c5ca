"""SwiGLU's product of a matrix that holds gate and up side by side; forward only.

    y[m, f] = silu(x[m, f]) * x[m, F + f]

Arithmetic is fp32, rounded once; where gate and up are products of their own, PyTorch rounds
silu(gate) too.

Tiling: a program takes BLOCK columns of one row. Memory traffic: 3 F b bytes a row of b-byte
elements, read once and written once.

Limits: fp16, bf16, fp32; x contiguous; offsets are int64.

Source: Shazeer, arXiv 2002.05202.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import check_tensor
from ic.kernels.launch import Launch, Launches, is_eager, needs_gradient

BLOCK = 1024


@triton.jit
def silu_mul_kernel(X, Y, F, BLOCK_F: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    at = X + row * 2 * F + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(Y + row * F + columns, y.to(Y.dtype.element_ty), mask=inside)


_launches = Launches()


def _compute(x: Tensor) -> Tensor:
    key = x.shape[-1], x.dtype, x.get_device(), x.is_contiguous()
    launch = _launches.get(key)
    if launch is None:
        check_tensor("x", x)
        if x.shape[-1] % 2 or not x.is_contiguous():
            raise ValueError(
                f"x: shape {tuple(x.shape)} with strides {x.stride()} given; the last dimension "
                "must be even, the tensor contiguous"
            )
        launch = _launches[key] = Launch(silu_mul_kernel, {"BLOCK_F": BLOCK}, num_warps=4)
    width = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    rows = y.numel() // max(width, 1)
    # The grid's second dimension ends at 65535.
    for first in range(0, rows, 65535):
        part = slice(first, min(first + 65535, rows))
        tensors = (x, y) if rows <= 65535 else (x.view(rows, -1)[part], y.view(rows, -1)[part])
        launch((-(-width // BLOCK), part.stop - first, 1), tensors, (width,))
    return y


@torch.library.custom_op("ic::silu_mul_halves", mutates_args=())
def silu_mul_halves_op(x: Tensor) -> Tensor:
    """As `silu_mul_halves`."""
    return _compute(x)


@silu_mul_halves_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def silu_mul_halves(x: Tensor) -> Tensor:
    """silu of the first half of the last dimension times the second, (..., 2 F) -> (..., F).

    Raises:
        ValueError: naming what is not supported.
    """
    if is_eager(x) and not needs_gradient(x):
        return _compute(x)
    return silu_mul_halves_op(x)
