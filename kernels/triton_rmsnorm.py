"""RMSNorm, forward and backward, optionally fused with the residual addition before it.

    h = x + residual (rounded to the dtype of x; h = x without a residual)
    r = 1 / sqrt(mean(h^2) + eps),  xhat = h r,  y = xhat * weight
    dh = r (g - xhat mean(g xhat)) + dh_from_above,  g = dy * weight
    dweight = sum over rows of dy * xhat

All arithmetic is fp32; y, h and the gradients are rounded once.

Tiling: forward, a program holds ROWS whole rows in registers. Backward, a fixed number of programs
walks over the rows in strides, keeps its part of dweight in fp32 registers and writes it out once;
a second small kernel adds the parts up in a fixed order, so dweight is reproducible.

Memory traffic per row of D elements of b bytes (weight and r are negligible): forward 2 D b (read
x, write y), with residual 4 D b; backward 3 D b (read h, dy, write dx), with residual 4 D b; plus 8
D bytes a program for dweight.

Limits: fp16, bf16, fp32; D <= 65536; rows are addressed with int64 and may be strided, the last
stride must be 1.

Source: Zhang and Sennrich, arXiv 1910.07467; the walk over rows as in Triton's layer-norm tutorial.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import FLOATS, check_tensor, compute_capability


@triton.jit
def rms_norm_forward_kernel(
    X, RESIDUAL, WEIGHT, Y, H_OUT, INVERSE, eps, num_rows, stride_x, stride_residual, D,
    HAS_RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    r64 = rows.to(tl.int64)[:, None]
    weight = tl.load(WEIGHT + columns, mask=columns < D, other=0.0).to(tl.float32)
    h = tl.load(X + r64 * stride_x + columns[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        h += tl.load(RESIDUAL + r64 * stride_residual + columns[None, :], mask=inside, other=0.0)
        tl.store(H_OUT + r64 * D + columns[None, :], h, mask=inside)
    h = h.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
    y = h * inverse[:, None] * weight[None, :]
    tl.store(Y + r64 * D + columns[None, :], y.to(Y.dtype.element_ty), mask=inside)
    tl.store(INVERSE + rows, inverse, mask=rows < num_rows)


@triton.jit
def rms_norm_backward_kernel(
    H, WEIGHT, INVERSE, DY, DH_ABOVE, DX, DWEIGHT_PARTS, num_rows, stride_h, stride_dy,
    stride_above, D,
    HAS_ABOVE: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < D
    weight = tl.load(WEIGHT + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, step, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & in_row[None, :]
        r64 = rows.to(tl.int64)[:, None]
        h = tl.load(H + r64 * stride_h + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + r64 * stride_dy + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(INVERSE + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = h * inverse
        g = dy * weight
        mean = tl.sum(g * normed, 1)[:, None] / D
        dx = (g - normed * mean) * inverse
        if HAS_ABOVE:
            above = tl.load(
                DH_ABOVE + r64 * stride_above + columns[None, :], mask=inside, other=0.0
            )
            dx += above.to(tl.float32)
        dweight += dy * normed
        tl.store(DX + r64 * D + columns[None, :], dx.to(DX.dtype.element_ty), mask=inside)
    part = DWEIGHT_PARTS + tl.program_id(0).to(tl.int64) * D + columns
    tl.store(part, tl.sum(dweight, 0), mask=in_row)


@triton.jit
def rms_norm_weight_gradient_kernel(
    DWEIGHT_PARTS, DWEIGHT, num_parts, D, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        inside = (parts < num_parts)[:, None] & (columns < D)[None, :]
        offset = parts.to(tl.int64)[:, None] * D + columns[None, :]
        total += tl.sum(tl.load(DWEIGHT_PARTS + offset, mask=inside, other=0.0), 0)
    tl.store(DWEIGHT + columns, total.to(DWEIGHT.dtype.element_ty), mask=columns < D)


# By the power of two that holds D. Forward: (rows a program, warps). Backward: (rows a step, warps,
# programs a multiprocessor, loop stages); stages > 1 copy ahead into shared memory, which pays from
# sm_80 on and fits from sm_90.
_FORWARD: dict[int, tuple[int, int]] = {
    1024: (4, 4), 2048: (2, 4), 4096: (1, 4), 8192: (1, 16), 65536: (1, 16),
}  # fmt: skip
_BACKWARD: dict[int, dict[int, tuple[int, int, int, int]]] = {
    0: {
        1024: (4, 4, 4, 1),
        2048: (2, 4, 4, 1),
        4096: (1, 4, 4, 1),
        8192: (1, 8, 2, 1),
        65536: (1, 16, 1, 1),
    },
    90: {
        1024: (4, 4, 2, 3),
        2048: (4, 8, 1, 3),
        4096: (2, 8, 1, 3),
        8192: (1, 8, 1, 3),
        65536: (1, 16, 1, 1),
    },
}


def _block(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def forward_tile(width: int) -> tuple[int, int]:
    """(rows a program, warps)."""
    return next(t for limit, t in _FORWARD.items() if _block(width) <= limit)


def backward_tile(capability: int, width: int) -> tuple[int, int, int, int]:
    """(rows a step, warps, programs a multiprocessor, loop stages) on a chip (90 for sm_90)."""
    table = _BACKWARD[max(c for c in _BACKWARD if c <= capability)]
    return next(t for limit, t in table.items() if _block(width) <= limit)


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D): a view when the leading dimensions can be merged, else a copy."""
    return x.reshape(-1, x.shape[-1])


def _num_programs(x: Tensor, per_multiprocessor: int, num_steps: int) -> int:
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return max(1, min(count * per_multiprocessor, num_steps))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    x2 = _rows(x)
    r2 = x2 if residual is None else _rows(residual)
    inverse = torch.empty(x2.shape[0], dtype=torch.float32, device=x.device)
    rows, num_warps = forward_tile(width)
    if x2.shape[0]:
        rms_norm_forward_kernel[(triton.cdiv(x2.shape[0], rows),)](
            x2, r2, weight, y, h, inverse, eps, x2.shape[0], x2.stride(0), r2.stride(0), width,
            HAS_RESIDUAL=residual is not None, BLOCK_D=_block(width), ROWS=rows,
            num_warps=num_warps,
        )  # fmt: skip
    return y, h, inverse


def _backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    width = h.shape[-1]
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dweight = torch.empty_like(weight)
    h2, dy2 = _rows(h), _rows(dy if dy.stride(-1) == 1 else dy.contiguous())
    if dh_above is None:
        above = dy2
    else:
        above = _rows(dh_above if dh_above.stride(-1) == 1 else dh_above.contiguous())
    num_rows = h2.shape[0]
    if num_rows == 0:
        return dx, dweight.zero_()
    rows, num_warps, per_multiprocessor, stages = backward_tile(compute_capability(h), width)
    num_programs = _num_programs(h, per_multiprocessor, triton.cdiv(num_rows, rows))
    parts = torch.empty((num_programs, width), dtype=torch.float32, device=h.device)
    rms_norm_backward_kernel[(num_programs,)](
        h2, weight, inverse, dy2, above, dx, parts, num_rows, h2.stride(0), dy2.stride(0),
        above.stride(0), width, HAS_ABOVE=dh_above is not None, BLOCK_D=_block(width), ROWS=rows,
        STAGES=stages, num_warps=num_warps,
    )  # fmt: skip
    rms_norm_weight_gradient_kernel[(triton.cdiv(width, 32),)](
        parts, dweight, num_programs, width, BLOCK_D=32, BLOCK_PARTS=64, num_warps=4
    )
    return dx, dweight


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    check_tensor("x", x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= 65536:
        raise ValueError(f"x: shape {tuple(x.shape)}; the last dimension must be 1 to 65536")
    if residual is not None:
        check_tensor("residual", residual, shape=tuple(x.shape), dtypes=(x.dtype,), like=x)
    check_tensor("weight", weight, shape=(x.shape[-1],), dtypes=FLOATS, like=x)
    if not eps >= 0:
        raise ValueError(f"eps: {eps} given, a number >= 0 expected")


@torch.library.custom_op("ic::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1/rms of every row."""
    _check(x, None, weight, eps)
    y, _, inverse = _forward(x, None, weight, eps)
    return y, inverse


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("ic::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h = x + residual, and 1/rms of every row of h."""
    _check(x, residual, weight, eps)
    return _forward(x, residual, weight, eps)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    inverse = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), inverse


@torch.library.custom_op("ic::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of h and weight; dh_above is added to the first."""
    return _backward(dy, dh_above, h, weight, inverse)


@rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _setup_norm(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_norm(ctx, dy, _):
    x, weight, inverse = ctx.saved_tensors
    dx, dweight = rms_norm_backward_op(dy, None, x, weight, inverse)
    return dx, dweight, None


def _setup_add_norm(ctx, inputs, output) -> None:
    _, h, inverse = output
    ctx.save_for_backward(h, inputs[2], inverse)
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)


def _backward_add_norm(ctx, dy, dh, _):
    h, weight, inverse = ctx.saved_tensors
    if dy is None:
        return dh, dh, None, None
    dx, dweight = rms_norm_backward_op(dy, dh, h, weight, inverse)
    return dx, dx, dweight, None


rms_norm_op.register_autograd(_backward_norm, setup_context=_setup_norm)
add_rms_norm_op.register_autograd(_backward_add_norm, setup_context=_setup_add_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x (..., D); differentiable in x and weight."""
    return rms_norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual); differentiable in x, residual and weight."""
    y, h, _ = add_rms_norm_op(x, residual, weight, eps)
    return y, h
