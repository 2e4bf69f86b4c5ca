"""Decoupled RoPE, forward and backward: the RoPE parts of all query heads and of the one shared key
in one launch.

    (a', b') = (a cos - b sin, a sin + b cos)

for the pairs (a, b) = (x_2i, x_2i+1) when interleaved (DeepSeek's view_as_complex; the output stays
interleaved), else (x_i, x_{i + P/2}). The backward pass is the same rotation with -sin, by the same
kernel.

Shapes: B batch, T tokens, H query heads, P qk_rope_head_dim. q (B, T, H, P), k (B, T, 1, P), cos
and sin (B or 1, T, P/2) fp32.

Tiling: a program rotates BLOCK_T tokens of BLOCK_H heads; the programs of the first head block
rotate the key too. Rows are read and written whole, so every access is 16 bytes wide in both
layouts.

Memory traffic: q and k read and written once, (H + 1) 4 P bytes a token in 16 bits; cos and sin 4 P
bytes a token and head block.

Limits: fp16, bf16, fp32; P a power of two >= 16; strides of B, T and H are free, the last must be
1.

Source: Su et al., arXiv 2104.09864; DeepSeek-V2, arXiv 2405.04434 (decoupled RoPE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ic.kernels.arguments import check_tensor
from ic.kernels.launch import Launch, Launches, is_eager, needs_gradient


@triton.jit
def _rotate(
    X, Y, rows, columns, inside, half_columns, cos, sin, INTERLEAVED: tl.constexpr,
    SHAPE: tl.constexpr,
    HALF_SHAPE: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, out_rows,
):  # fmt: skip
    if INTERLEAVED:
        x = tl.load(X + rows + columns, mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(x, PAIRS))
        a, b = a.to(tl.float32), b.to(tl.float32)
        y = tl.join(a * cos - b * sin, a * sin + b * cos)
        y = tl.reshape(y.to(Y.dtype.element_ty), SHAPE)
        tl.store(Y + out_rows + columns, y, mask=inside)
    else:
        a = tl.load(X + rows + half_columns, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(X + rows + P // 2 + half_columns, mask=inside, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(Y.dtype.element_ty)
        second = (a * sin + b * cos).to(Y.dtype.element_ty)
        tl.store(Y + out_rows + half_columns, first, mask=inside)
        tl.store(Y + out_rows + P // 2 + half_columns, second, mask=inside)


@triton.jit
def rope_kernel(
    Q, K, COS, SIN, Q_OUT, K_OUT, T, H,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt,
    stride_cb, stride_ct, stride_sb, stride_st,
    P: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t64 = tokens.to(tl.int64)
    half = tl.arange(0, P // 2)
    t_inside = tokens < T

    cos_offset = batch * stride_cb + t64[:, None] * stride_ct + half[None, :]
    sin_offset = batch * stride_sb + t64[:, None] * stride_st + half[None, :]
    cos = tl.load(COS + cos_offset, mask=t_inside[:, None], other=0.0)
    sin = tl.load(SIN + sin_offset, mask=t_inside[:, None], other=0.0)
    if INVERSE:
        sin = -sin

    h64 = heads.to(tl.int64)[None, :, None]
    inside = t_inside[:, None, None] & (heads < H)[None, :, None]
    rows = batch * stride_qb + t64[:, None, None] * stride_qt + h64 * stride_qh
    out_rows = ((batch * T + t64[:, None, None]) * H + h64) * P
    _rotate(
        Q, Q_OUT, rows, tl.arange(0, P)[None, None, :], inside, half[None, None, :],
        cos[:, None, :], sin[:, None, :], INTERLEAVED, [BLOCK_T, BLOCK_H, P],
        [BLOCK_T, BLOCK_H, P // 2], [BLOCK_T, BLOCK_H, P // 2, 2], P, out_rows,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        k_rows = batch * stride_kb + t64[:, None] * stride_kt
        k_out_rows = (batch * T + t64[:, None]) * P
        _rotate(
            K, K_OUT, k_rows, tl.arange(0, P)[None, :], t_inside[:, None], half[None, :], cos, sin,
            INTERLEAVED, [BLOCK_T, P], [BLOCK_T, P // 2], [BLOCK_T, P // 2, 2], P, k_out_rows,
        )  # fmt: skip


def rope_tile(num_heads: int, width: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_H, num_warps): about 2048 elements a program, 32 a thread."""
    block_h = min(triton.next_power_of_2(num_heads), 16)
    block_t = max(1, 2048 // (block_h * width))
    return block_t, block_h, 2


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_tensor("q", q, shape=(None,) * 4)
    num_batch, num_tokens, _, width = q.shape
    if width < 16 or width & (width - 1):
        raise ValueError(f"q: width {width} is not a power of two >= 16")
    if num_batch > 65535:
        raise ValueError(f"q: batch {num_batch}, at most 65535; split it")
    check_tensor("k", k, shape=(num_batch, num_tokens, 1, width), dtypes=(q.dtype,), like=q)
    for name, x in (("cos", cos), ("sin", sin)):
        rows = x.shape[0] if x.dim() == 3 and x.shape[0] in (1, num_batch) else num_batch
        check_tensor(name, x, shape=(rows, num_tokens, width // 2), dtypes=(torch.float32,), like=q)


# For each kind of input: the launch, its grid and its numbers.
_launches = Launches()


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    key = (
        q.shape, q.stride(), q.dtype, q.get_device(), k.shape, k.stride(), k.dtype, k.get_device(),
        cos.shape, cos.stride(), cos.dtype, cos.get_device(),
        sin.shape, sin.stride(), sin.dtype, sin.get_device(), interleaved, inverse,
    )  # fmt: skip
    ready = _launches.get(key)
    if ready is None:
        _check(q, k, cos, sin)
        ready = _launches[key] = _prepare(q, k, cos, sin, interleaved, inverse)
    launch, grid, numbers = ready
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    if q.numel():
        launch(grid, (q, k, cos, sin, q_out, k_out), numbers)
    return q_out, k_out


def _prepare(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Launch, tuple[int, int, int], tuple[int, ...]]:
    num_batch, num_tokens, num_heads, width = q.shape
    block_t, block_h, num_warps = rope_tile(num_heads, width)
    constants = {
        "P": width,
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "BLOCK_T": block_t,
        "BLOCK_H": block_h,
    }
    numbers = (
        num_tokens, num_heads, *q.stride()[:3], *k.stride()[:2],
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1),
    )  # fmt: skip
    grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(num_heads, block_h), num_batch)
    return Launch(rope_kernel, constants, num_warps=num_warps), grid, numbers


@torch.library.custom_op("ic::rope", mutates_args=())
def rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, contiguous; by the negative angle when inverse."""
    return _rotated(q, k, cos, sin, interleaved, inverse)


@rope_op.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    dq, dk = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk))
    rotate = _rotated if is_eager(dq, dk, cos, sin) else rope_op
    dq, dk = rotate(dq, dk, cos, sin, ctx.interleaved, not ctx.inverse)
    return dq, dk, None, None, None, None


rope_op.register_autograd(_backward, setup_context=_setup_context)


class _Rope(torch.autograd.Function):
    """`rope_op` without the operator."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return _rotated(*inputs)

    backward = staticmethod(once_differentiable(_backward))  # type: ignore[assignment]


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, P) and k (B, T, 1, P) by cos, sin (B or 1, T, P/2) fp32; differentiable in
    q and k.

    Raises:
        ValueError: naming the argument whose dtype, device, shape or stride is not supported.
    """
    if not is_eager(q, k, cos, sin):
        return rope_op(q, k, cos, sin, interleaved, False)
    if needs_gradient(q, k):
        return _Rope.apply(q, k, cos, sin, interleaved, False)
    return _rotated(q, k, cos, sin, interleaved, False)
