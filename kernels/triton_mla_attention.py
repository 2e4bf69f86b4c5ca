"""Causal attention for training and prefill with unequal head widths (MLA, expanded form): forward.

    out_t = sum_s softmax_s(scale * q_t . k_s) v_s      over the visible keys s
    lse_t = log sum_s exp(scale * q_t . k_s)

Key s (of S) is visible to query t (of T) when s <= t + (S - T) and both lie in the same document.
The queries are the last T of the S positions, so T < S is chunked prefill against a longer cache. A
document is a maximal run of equal `document_ids`; an id that comes back later starts a new
document. A piece of cached keys that lie before all queries (`attend_piece`) is seen by each of
them; its result is merged with that of other pieces by their lse.

Shapes: B batch, T queries, S keys, H heads, D = D1 + D2 width of q and k, V width of v. D1 is the
largest power of two not above D; 192 is loaded as 128 + 64 columns, so nothing is padded in memory
or in the matrix product.

Tiling: a program owns BLOCK_M queries of one head and walks over the visible keys BLOCK_N at a time
with the online softmax (base 2, log2(e) folded into the scale). Blocks that are visible as a whole
run without a mask. Loads go through tensor descriptors: the TMA engine on Hopper and newer, masked
pointer loads before.

Memory traffic: q and out once, lse once; k and v once from device memory (one head's k and v stay
in the L2 cache while its queries are worked off: heads are the slow grid axis), T / BLOCK_M times
from L2. FLOP counted: 2 * (D + V) for each visible pair (query, key).

Limits: fp16, bf16, fp32; D a power of two or a sum of two with each >= 16; V a power of two >= 16;
T, S < 2**31. Strides of B, T and H are free; the last must be 1. Rows that are not 16-byte aligned
are copied once.

Source: Dao, "FlashAttention-2", arXiv 2307.08691; Milakov and Gimelshein, arXiv 1805.02867 (online
softmax). The backward pass is in triton_mla_attention_backward.py, the specification in
reference.attention_reference.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import check_tensor, compute_capability, tma_compatible
from ic.kernels.reference import document_bounds
from ic.kernels.triton_mla_attention_backward import (
    attention_backward,
    key_bounds,
    set_descriptor_allocator,
)
from ic.kernels.triton_mla_attention_hopper import hopper_supports
from ic.kernels.widths import split_width

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = math.log2(math.e)


@triton.jit
def _softmax_step(
    acc, row_sum, row_max, q1, q2, k1, k2, v, n0, pos_q, start_q, scale_log2,
    MASKED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr, D2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One online-softmax update of acc with BLOCK_N keys from n0 on."""
    s = tl.dot(q1, k1.T, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(q2, k2.T, s, input_precision=PRECISION)
    if MASKED:
        keys = n0 + tl.arange(0, BLOCK_N)
        visible = keys[None, :] <= pos_q[:, None]
        if HAS_DOCUMENTS:
            visible &= keys[None, :] >= start_q[:, None]
        s = tl.where(visible, s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    if MASKED and HAS_DOCUMENTS:  # a row that has seen no key yet: avoid -inf - -inf
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        shift = new_max
    p = tl.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.exp2(row_max - shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def mla_attention_forward_kernel(
    Q, K, V, OUT, LSE, DOCUMENT_START, scale_log2, H, T, S,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The longest rows first, heads slow: k and v of one head stay in L2.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1) % H
    batch = tl.program_id(1) // H
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    offset = S - T

    q_base = Q + b64 * stride_qb + h64 * stride_qh
    k_base = K + b64 * stride_kb + h64 * stride_kh
    q_desc1 = tl.make_tensor_descriptor(q_base, [T, D1], [stride_qt, 1], [BLOCK_M, D1])
    k_desc1 = tl.make_tensor_descriptor(k_base, [S, D1], [stride_kt, 1], [BLOCK_N, D1])
    v_desc = tl.make_tensor_descriptor(
        V + b64 * stride_vb + h64 * stride_vh, [S, DV], [stride_vt, 1], [BLOCK_N, DV]
    )
    q1 = q_desc1.load([m0, 0])
    q2 = q1
    k_desc2 = k_desc1
    if D2 > 0:
        q_desc2 = tl.make_tensor_descriptor(q_base + D1, [T, D2], [stride_qt, 1], [BLOCK_M, D2])
        k_desc2 = tl.make_tensor_descriptor(k_base + D1, [S, D2], [stride_kt, 1], [BLOCK_N, D2])
        q2 = q_desc2.load([m0, 0])

    rows = m0 + tl.arange(0, BLOCK_M)
    if CAUSAL:
        pos_q = offset + rows
        start_q, begin, full_begin, full_end, end = key_bounds(
            DOCUMENT_START, b64, m0, rows, offset, T, S, BLOCK_M, BLOCK_N, HAS_DOCUMENTS
        )
    else:  # every query stands at the last key
        pos_q = tl.zeros([BLOCK_M], tl.int32) + (S - 1)
        start_q = pos_q
        begin = 0
        full_begin = 0
        full_end = S // BLOCK_N * BLOCK_N
        end = S

    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

    if HAS_DOCUMENTS:
        for n0 in tl.range(begin, full_begin, BLOCK_N):
            k1 = k_desc1.load([n0, 0])
            k2 = k_desc2.load([n0, 0])
            acc, row_sum, row_max = _softmax_step(
                acc, row_sum, row_max, q1, q2, k1, k2, v_desc.load([n0, 0]), n0, pos_q, start_q,
                scale_log2, True, True, BLOCK_N, D2, PRECISION,
            )  # fmt: skip
    for n0 in tl.range(full_begin, full_end, BLOCK_N):
        k1 = k_desc1.load([n0, 0])
        k2 = k_desc2.load([n0, 0])
        acc, row_sum, row_max = _softmax_step(
            acc, row_sum, row_max, q1, q2, k1, k2, v_desc.load([n0, 0]), n0, pos_q, start_q,
            scale_log2, False, HAS_DOCUMENTS, BLOCK_N, D2, PRECISION,
        )  # fmt: skip
    for n0 in tl.range(full_end, end, BLOCK_N):
        k1 = k_desc1.load([n0, 0])
        k2 = k_desc2.load([n0, 0])
        acc, row_sum, row_max = _softmax_step(
            acc, row_sum, row_max, q1, q2, k1, k2, v_desc.load([n0, 0]), n0, pos_q, start_q,
            scale_log2, True, HAS_DOCUMENTS, BLOCK_N, D2, PRECISION,
        )  # fmt: skip

    out = acc / row_sum[:, None]
    out_desc = tl.make_tensor_descriptor(
        OUT + b64 * stride_ob + h64 * stride_oh, [T, DV], [stride_ot, 1], [BLOCK_M, DV]
    )
    out_desc.store([m0, 0], out.to(OUT.dtype.element_ty))
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(LSE + (b64 * H + head) * T + rows, lse, mask=rows < T)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by compute capability (the largest not above the
# device's), then by
# D + V <= key for 16-bit inputs. Each entry compiles without spills and within the chip's shared
# memory.
_FORWARD_TILES: dict[int, dict[int, tuple[int, int, int, int]]] = {
    0: {10**6: (32, 32, 4, 1)},  # interpreter
    80: {192: (128, 64, 8, 2), 10**6: (128, 32, 8, 3)},
    90: {192: (128, 64, 8, 3), 10**6: (128, 64, 8, 4)},
    100: {10**6: (128, 64, 8, 2)},
}
_FP32_TILE = (32, 16, 4, 1)


def forward_tile(capability: int, width: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The tile for a chip (90 for sm_90), D + V and the dtype."""
    if dtype == torch.float32 and capability:
        return _FP32_TILE
    table = _FORWARD_TILES[max(c for c in _FORWARD_TILES if c <= capability)]
    return next(tile for limit, tile in table.items() if width <= limit)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    document_ids: Tensor | None,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    num_batch, num_queries, num_heads, width = q.shape
    num_keys, v_width = v.shape[1], v.shape[-1]
    out = torch.empty((*q.shape[:3], v_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = tma_compatible(q), tma_compatible(k), tma_compatible(v)
    start = None if document_ids is None else document_bounds(document_ids)[0]
    if hopper_supports(q, v):
        from ic.kernels.triton_mla_attention_hopper import hopper_forward

        hopper_forward(q, k, v, out, lse, start, scale, causal=causal)
        return out, lse
    d1, d2 = split_width(width)
    block_m, block_n, num_warps, num_stages = forward_tile(
        compute_capability(q), width + v_width, q.dtype
    )
    set_descriptor_allocator(q)
    grid = (triton.cdiv(num_queries, block_m), num_batch * num_heads)
    mla_attention_forward_kernel[grid](
        q, k, v, out, lse, q if start is None else start,
        scale * LOG2_E, num_heads, num_queries, num_keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        D1=d1, D2=d2, DV=v_width, BLOCK_M=block_m, BLOCK_N=block_n, HAS_DOCUMENTS=start is not None,
        CAUSAL=causal, PRECISION="ieee", num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    document_ids: Tensor | None,
    *,
    causal: bool = True,
) -> None:
    check_tensor("q_BTHD", q, shape=(None,) * 4)
    num_batch, num_queries, num_heads, width = q.shape
    check_tensor("k_BSHD", k, shape=(num_batch, None, num_heads, width), dtypes=(q.dtype,), like=q)
    num_keys = k.shape[1]
    check_tensor(
        "v_BSHV", v, shape=(num_batch, num_keys, num_heads, None), dtypes=(q.dtype,), like=q
    )
    if causal and num_queries > num_keys:
        raise ValueError(
            f"q_BTHD: {num_queries} queries, but k_BSHD holds {num_keys} keys, of which the "
            "queries are the last positions; give at most as many"
        )
    if num_batch * num_heads > 65535:
        raise ValueError(
            f"q_BTHD: batch x heads is {num_batch * num_heads}, at most 65535; split it"
        )
    split_width(width)
    v_width = v.shape[-1]
    if v_width < 16 or v_width & (v_width - 1):
        raise ValueError(f"v_BSHV: width {v_width} is not a power of two >= 16")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: {scale} given, a positive finite number expected")
    if compute_capability(q) and compute_capability(q) < 80:
        raise ValueError(
            "q_BTHD: this kernel needs sm_80 or newer; use the torch attention backend"
        )
    if document_ids is not None:
        check_tensor(
            "document_ids", document_ids, shape=(num_batch, num_keys), dtypes=(torch.int32,), like=q
        )


@torch.library.custom_op("ic::mla_attention", mutates_args=())
def mla_attention_op(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHV: Tensor, scale: float, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, T, H, V) and log-sum-exp (B, H, T) fp32; only out is differentiable."""
    _check(q_BTHD, k_BSHD, v_BSHV, scale, document_ids)
    return _forward(q_BTHD, k_BSHD, v_BSHV, scale, document_ids)


@mla_attention_op.register_fake
def _(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHV: Tensor, scale: float, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_batch, num_queries, num_heads, _ = q_BTHD.shape
    out = q_BTHD.new_empty((num_batch, num_queries, num_heads, v_BSHV.shape[-1]))
    lse = q_BTHD.new_empty((num_batch, num_heads, num_queries), dtype=torch.float32)
    return out, lse


@torch.library.custom_op("ic::mla_attention_backward", mutates_args=())
def mla_attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    return attention_backward(dout, q, k, v, out, lse, scale, document_ids)


@mla_attention_backward_op.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, scale, document_ids = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    q, k, v, out, lse, document_ids = ctx.saved_tensors
    dq, dk, dv = mla_attention_backward_op(grad_out, q, k, v, out, lse, ctx.scale, document_ids)
    return dq, dk, dv, None, None


mla_attention_op.register_autograd(_backward, setup_context=_setup_context)


def mla_attention(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    *,
    scale: float,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Causal attention; differentiable in q, k and v.

    Args:
        q_BTHD: queries (B, T, H, D), the last T of the S positions.
        k_BSHD: keys (B, S, H, D), the shared RoPE part already broadcast over the heads.
        v_BSHV: values (B, S, H, V).
        scale: what the scores are multiplied by, positive.
        document_ids: (B, S) int32; a query sees the keys of its own run of equal ids only.

    Returns:
        out (B, T, H, V) in the dtype of q.

    Raises:
        ValueError: naming the argument whose dtype, device, shape or stride is not supported.
    """
    return mla_attention_op(q_BTHD, k_BSHD, v_BSHV, scale, document_ids)[0]


def attend_piece(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHV: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention to a piece of the keys, for a prefill in pieces; not differentiable.

    Args:
        q_BTHD, k_BSHD, v_BSHV, scale: as in `mla_attention`.
        causal: the queries are the last T of the S positions; else they see all S keys, of which
            there may be fewer than queries.

    Returns:
        out (B, T, H, V) in the dtype of q, and the log-sum-exp of the scores (B, H, T) fp32.

    Raises:
        ValueError: as `mla_attention`, and for a piece without keys.
    """
    _check(q_BTHD, k_BSHD, v_BSHV, scale, None, causal=causal)
    if not k_BSHD.shape[1]:
        raise ValueError("k_BSHD: no key; give a piece of at least one")
    return _forward(q_BTHD, k_BSHD, v_BSHV, scale, None, causal=causal)
