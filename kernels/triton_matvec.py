"""Product of a matrix with one vector, with what stands before it: residual addition, norm, SwiGLU.

    h = x + residual (rounded to the dtype of x; h = x without a residual)
    v = h rsqrt(mean(h^2) + eps) * norm (rounded), or x without a norm
    y = W v, or with SwiGLU  y = silu(W_gate v) * (W_up v)

Decoding one row reads every weight once and computes next to nothing, so a layer takes the time of
its bytes plus that of its launches. Here the norm costs no launch: each program normalises the
vector for itself, which lies in L2, while its rows of the matrix are on their way.

Tiling: a program takes BLOCK_X rows (of gate and of up each) in pieces of BLOCK_D columns; one
piece is in flight for each program, and many programs run on a multiprocessor. From sm_90 on a
program asks for its first piece before it waits for the kernel that makes the vector (programmatic
dependent launch), so the pause between two kernels is filled with reading. Weights are written by
no kernel of a pass.

Memory traffic: the matrix once; the vector once for each program, from L2.

Limits: one vector; fp16, bf16, fp32, all of one dtype; W contiguous; offsets are int64.

Source: RMSNorm as `triton_rmsnorm`; the early reading is that of CUDA's programming guide, section
"Programmatic Dependent Launch".
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import FLOATS, check_tensor
from ic.kernels.launch import Launch, Launches, is_eager, needs_gradient
from ic.kernels.mla_decode_launch import device_of


@triton.jit
def matvec_kernel(
    X, RESIDUAL, NORM, W, Y, H, eps, NUM_ROWS, D,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    columns = tl.arange(0, BLOCK_D)
    row_ok = (rows < NUM_ROWS)[:, None]
    at = W + rows.to(tl.int64)[:, None] * D + columns[None, :]
    up_at = at + NUM_ROWS.to(tl.int64) * D
    inside = row_ok & (columns < D)[None, :]
    w = tl.load(at, mask=inside, other=0.0)
    u = w
    if SWIGLU:
        u = tl.load(up_at, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inverse = 1.0
    if HAS_NORM:
        squares = 0.0
        for piece in tl.static_range(PIECES):
            c = piece * BLOCK_D + columns
            h = tl.load(X + c, mask=c < D, other=0.0)
            if HAS_RESIDUAL:
                h += tl.load(RESIDUAL + c, mask=c < D, other=0.0)
                if tl.program_id(0) == 0:
                    tl.store(H + c, h, mask=c < D)
            h = h.to(tl.float32)
            squares += tl.sum(h * h, 0)
        inverse = tl.rsqrt(squares / D + eps)
    y = tl.zeros([BLOCK_X], tl.float32)
    z = tl.zeros([BLOCK_X], tl.float32)
    for piece in tl.static_range(PIECES):
        c = piece * BLOCK_D + columns
        if piece > 0:
            inside = row_ok & (c < D)[None, :]
            w = tl.load(at + piece * BLOCK_D, mask=inside, other=0.0)
            if SWIGLU:
                u = tl.load(up_at + piece * BLOCK_D, mask=inside, other=0.0)
        v = tl.load(X + c, mask=c < D, other=0.0)
        if HAS_NORM:
            if HAS_RESIDUAL:
                v += tl.load(RESIDUAL + c, mask=c < D, other=0.0)
            weight = tl.load(NORM + c, mask=c < D, other=0.0).to(tl.float32)
            v = (v.to(tl.float32) * inverse * weight).to(X.dtype.element_ty)
        v = v.to(tl.float32)[None, :]
        y += tl.sum(w.to(tl.float32) * v, 1)
        if SWIGLU:
            z += tl.sum(u.to(tl.float32) * v, 1)
    if SWIGLU:
        gate = y.to(Y.dtype.element_ty).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * z.to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + rows, y.to(Y.dtype.element_ty), mask=rows < NUM_ROWS)


def matvec_tile(width: int, *, swiglu: bool) -> tuple[int, int, int]:
    """(rows a program, columns a piece, warps)."""
    block_d = min(max(triton.next_power_of_2(width), 16), 2048)
    return (2 if swiglu else 4), block_d, 4


_launches = Launches()


def _compute(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    swiglu: bool,
) -> tuple[Tensor, Tensor | None]:
    key = (
        x.dtype, x.shape, x.is_contiguous(), x.get_device(),
        weight.dtype, weight.shape, weight.is_contiguous(), weight.get_device(), swiglu,
        None if norm_weight is None else (norm_weight.dtype, norm_weight.shape,
                                          norm_weight.stride(), norm_weight.get_device()),
        None if residual is None else (residual.dtype, residual.shape, residual.is_contiguous(),
                                       residual.get_device()),
    )  # fmt: skip
    ready = _launches.get(key)
    if ready is None:
        _check(x, weight, norm_weight, residual, swiglu=swiglu)
        width = x.shape[-1]
        rows = weight.shape[0] // (2 if swiglu else 1)
        block_x, block_d, num_warps = matvec_tile(width, swiglu=swiglu)
        device = device_of(x)
        early = {"launch_pdl": True} if device.capability >= 90 and not device.interpreted else {}
        constants = {
            "HAS_RESIDUAL": residual is not None,
            "HAS_NORM": norm_weight is not None,
            "SWIGLU": swiglu,
            "BLOCK_X": block_x,
            "BLOCK_D": block_d,
            "PIECES": triton.cdiv(width, block_d),
            "PDL": bool(early),
        }
        launch = Launch(matvec_kernel, constants, num_warps=num_warps, **early)
        ready = _launches[key] = launch, (triton.cdiv(rows, block_x), 1, 1), (rows, width)
    launch, grid, numbers = ready
    y = x.new_empty((*x.shape[:-1], numbers[0]))
    total = None if residual is None else torch.empty_like(x)
    launch(grid, (x, residual, norm_weight, weight, y, total), (float(eps), *numbers))
    return y, total


@torch.library.custom_op("ic::matvec", mutates_args=())
def matvec_op(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    swiglu: bool,
) -> list[Tensor]:
    """As `matvec`; the sum only where there is a residual."""
    y, total = _compute(x, weight, norm_weight, residual, eps, swiglu)
    return [y] if total is None else [y, total]


@matvec_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    swiglu: bool,
) -> list[Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if swiglu else 1)))
    return [y] if residual is None else [y, torch.empty_like(x)]


def matvec(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (..., X), or with `swiglu` (..., X / 2), of one vector x (..., D) and weight (X, D); and
    x + residual, which is x without a residual. Without gradients.

    Args:
        norm_weight, eps: of the norm, if there is one.
        residual: added to x before the norm.

    Raises:
        ValueError: naming the argument whose dtype, device, shape or stride is not supported.
    """
    tensors = x, weight, norm_weight, residual
    if is_eager(*tensors) and not needs_gradient(*tensors):
        y, total = _compute(*tensors, eps, swiglu)
    else:
        y, *sums = matvec_op(*tensors, eps, swiglu)
        total = sums[0] if sums else None
    return y, x if total is None else total


def _check(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, residual: Tensor | None, *, swiglu: bool
) -> None:
    check_tensor("x", x)
    width = x.shape[-1]
    if x.numel() != width or not x.is_contiguous():
        raise ValueError(
            f"x: shape {tuple(x.shape)} given; one contiguous vector (..., D) expected"
        )
    check_tensor("weight", weight, shape=(None, width), dtypes=(x.dtype,), like=x)
    if not weight.is_contiguous() or (swiglu and len(weight) % 2):
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} with strides {weight.stride()} given; a "
            "contiguous one expected, with an even number of rows for SwiGLU"
        )
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, shape=(width,), dtypes=FLOATS, like=x)
    if residual is not None:
        check_tensor("residual", residual, shape=tuple(x.shape), dtypes=(x.dtype,), like=x)
        if norm_weight is None or not residual.is_contiguous():
            raise ValueError("residual: goes with a norm, and must be contiguous")
