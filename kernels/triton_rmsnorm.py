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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ic.kernels.arguments import FLOATS, check_tensor, compute_capability
from ic.kernels.launch import Launch, Launches, is_eager, needs_gradient


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward_kernel(
    X, RESIDUAL, WEIGHT, Y, H_OUT, INVERSE, eps, num_rows, stride_x, stride_residual, D,
    HAS_RESIDUAL: tl.constexpr, HAS_INVERSE: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
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
    if HAS_INVERSE:
        tl.store(INVERSE + rows, inverse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
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


@triton.jit(do_not_specialize=["num_parts"])
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
        1024: (4, 4, 4, 1), 2048: (2, 4, 4, 1), 4096: (1, 4, 4, 1), 8192: (1, 8, 2, 1),
        65536: (1, 16, 1, 1),
    },
    90: {
        1024: (4, 4, 2, 3), 2048: (4, 8, 1, 3), 4096: (2, 8, 1, 3), 8192: (1, 8, 1, 3),
        65536: (1, 16, 1, 1),
    },
}  # fmt: skip


def _block(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def forward_tile(width: int) -> tuple[int, int]:
    """(rows a program, warps)."""
    return next(t for limit, t in _FORWARD.items() if _block(width) <= limit)


def backward_tile(capability: int, width: int) -> tuple[int, int, int, int]:
    """(rows a step, warps, programs a multiprocessor, loop stages) on a chip (90 for sm_90)."""
    table = _BACKWARD[max(c for c in _BACKWARD if c <= capability)]
    return next(t for limit, t in table.items() if _block(width) <= limit)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    check_tensor("x", x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= 65536:
        raise ValueError(f"x: shape {tuple(x.shape)}; the last dimension must be 1 to 65536")
    if residual is not None:
        check_tensor("residual", residual, shape=tuple(x.shape), dtypes=(x.dtype,), like=x)
    check_tensor("weight", weight, shape=(x.shape[-1],), dtypes=FLOATS, like=x)
    if not eps >= 0:
        raise ValueError(f"eps: {eps} given, a number >= 0 expected")


# For each kind of input: the launch, and the rows that a program takes (a step of its walk).
_forward_launches, _backward_launches = Launches(), Launches()


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """What lies as (rows, D), and the stride of its rows: x itself when the leading dimensions can
    be merged, else a copy.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    return rows, rows.stride(0)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, keep_inverse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, h = x + residual if there is one, and if wanted 1/rms of every row."""
    if not x.dim() or not x.numel():
        _check(x, residual, weight, eps)
    x2, stride_x = _as_rows(x)
    width = x.shape[-1]
    key: tuple[Any, ...] = (
        x.dtype, width, stride_x, x.stride(-1), x.get_device(), weight.dtype, weight.shape,
        weight.stride(), weight.get_device(), eps, keep_inverse,
    )  # fmt: skip
    residual2, stride_residual, h = None, 0, None
    if residual is not None:
        residual2, stride_residual = _as_rows(residual)
        same = residual.shape == x.shape
        key += (
            same, residual.dtype, stride_residual, residual.stride(-1), residual.get_device()
        )  # fmt: skip
    ready = _forward_launches.get(key)
    if ready is None:
        _check(x, residual, weight, eps)
        rows, num_warps = forward_tile(width)
        constants = {
            "HAS_RESIDUAL": residual is not None,
            "HAS_INVERSE": keep_inverse,
            "BLOCK_D": _block(width),
            "ROWS": rows,
        }
        ready = Launch(rms_norm_forward_kernel, constants, num_warps=num_warps), rows
        _forward_launches[key] = ready
    launch, rows = ready
    num_rows = x.numel() // width
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is not None:
        h = torch.empty_like(y)
    inverse = None
    if keep_inverse:
        inverse = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        launch(
            (-(-num_rows // rows), 1, 1),
            (x2, residual2, weight, y, h, inverse),
            (eps, num_rows, stride_x, stride_residual, width),
        )
    return y, h, inverse


def _backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    width = h.shape[-1]
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight)
    num_rows = h.numel() // width
    if num_rows == 0:
        return dx, dweight.zero_()
    h2, stride_h = _as_rows(h)
    dy2, stride_dy = _as_rows(dy if dy.stride(-1) == 1 else dy.contiguous())
    above2, stride_above, above_type = None, 0, None
    if dh_above is not None:
        above_type = dh_above.dtype
        above2, stride_above = _as_rows(
            dh_above if dh_above.stride(-1) == 1 else dh_above.contiguous()
        )
    key = (
        h.dtype, dy.dtype, above_type, weight.dtype, width, stride_h, stride_dy, stride_above,
        h.get_device(),
    )  # fmt: skip
    ready = _backward_launches.get(key)
    if ready is None:
        rows, num_warps, per_multiprocessor, stages = backward_tile(compute_capability(h), width)
        constants = {
            "HAS_ABOVE": dh_above is not None,
            "BLOCK_D": _block(width),
            "ROWS": rows,
            "STAGES": stages,
        }
        ready = (
            Launch(rms_norm_backward_kernel, constants, num_warps=num_warps),
            Launch(
                rms_norm_weight_gradient_kernel, {"BLOCK_D": 32, "BLOCK_PARTS": 64}, num_warps=4
            ),
            rows,
            _num_multiprocessors(h) * per_multiprocessor,
        )
        _backward_launches[key] = ready
    launch, weight_launch, rows, most_programs = ready
    num_programs = min(most_programs, -(-num_rows // rows))
    parts = torch.empty((num_programs, width), dtype=torch.float32, device=h.device)
    launch(
        (num_programs, 1, 1),
        (h2, weight, inverse, dy2, above2, dx, parts),
        (num_rows, stride_h, stride_dy, stride_above, width),
    )
    weight_launch((-(-width // 32), 1, 1), (parts, dweight), (num_programs, width))
    return dx, dweight


def _num_multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


@torch.library.custom_op("ic::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1/rms of every row."""
    y, _, inverse = _forward(x, None, weight, eps, keep_inverse=True)
    assert inverse is not None
    return y, inverse


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("ic::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h = x + residual, and 1/rms of every row of h."""
    y, h, inverse = _forward(x, residual, weight, eps, keep_inverse=True)
    assert h is not None
    assert inverse is not None
    return y, h, inverse


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


def _gradients(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    compute = _backward if is_eager(dy, dh_above, h, weight, inverse) else rms_norm_backward_op
    return compute(dy, dh_above, h, weight, inverse)


def _setup_norm(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_norm(ctx, dy, _):
    return *_gradients(dy, None, *ctx.saved_tensors), None


def _setup_add_norm(ctx, inputs, output) -> None:
    _, h, inverse = output
    ctx.save_for_backward(h, inputs[2], inverse)
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)


def _backward_add_norm(ctx, dy, dh, _):
    if dy is None:
        return dh, dh, None, None
    dx, dweight = _gradients(dy, dh, *ctx.saved_tensors)
    return dx, dx, dweight, None


rms_norm_op.register_autograd(_backward_norm, setup_context=_setup_norm)
add_rms_norm_op.register_autograd(_backward_add_norm, setup_context=_setup_add_norm)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm_op` without the operator."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, _, inverse = _forward(x, None, weight, eps, keep_inverse=True)
        _setup_norm(ctx, (x, weight, eps), (y, inverse))
        return y, inverse

    backward = staticmethod(once_differentiable(_backward_norm))  # type: ignore[assignment]


class _AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm_op` without the operator."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        output = _forward(x, residual, weight, eps, keep_inverse=True)
        _setup_add_norm(ctx, (x, residual, weight, eps), output)
        return output

    backward = staticmethod(once_differentiable(_backward_add_norm))  # type: ignore[assignment]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x (..., D); differentiable in x and weight.

    Raises:
        ValueError: naming the argument whose dtype, device, shape or stride is not supported.
    """
    eps = float(eps)
    if not is_eager(x, weight):
        return rms_norm_op(x, weight, eps)[0]
    if needs_gradient(x, weight):
        return _RMSNorm.apply(x, weight, eps)[0]
    return _forward(x, None, weight, eps, keep_inverse=False)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual); differentiable in x, residual and weight.

    Raises:
        ValueError: as `rms_norm`.
    """
    eps = float(eps)
    if not is_eager(x, residual, weight):
        y, h, _ = add_rms_norm_op(x, residual, weight, eps)
    elif needs_gradient(x, residual, weight):
        y, h, _ = _AddRMSNorm.apply(x, residual, weight, eps)
    else:
        y, h, _ = _forward(x, residual, weight, eps, keep_inverse=False)
    return y, h
