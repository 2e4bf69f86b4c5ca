"""Causal attention for training with unequal head widths: backward, without atomics, so every
gradient is reproducible.

With p_ts = exp(scale * q_t . k_s - lse_t) and delta_t = sum_v out_tv dout_tv:

    dv_s = sum_t p_ts dout_t
    ds_ts = p_ts (dout_t . v_s - delta_t)
    dk_s = scale * sum_t ds_ts q_t            dq_t = scale * sum_s ds_ts k_s

Three launches: delta; then dk and dv (a program owns BLOCK_N keys and walks over the queries that
see them); then dq (a program owns BLOCK_M queries and walks over the keys it sees). The
probabilities are computed twice, once in each walk: 2 * (4 D + 3 V) FLOP for each visible pair are
executed (2304 at 192/128), of which 2 * (3 D + 2 V) (1664) are counted in every figure, as for
kernels that add dq up with atomics. What that buys: no fp32 dq buffer (4 T H D bytes), no order
dependence, and every second matrix product takes its left operand from registers.

Memory traffic: q, k, v, dout once each a kernel from device memory, out once, three gradients once;
from L2 the walked-over tensors T / BLOCK times.

Masks, limits and shapes: as in triton_mla_attention.py. Source: Dao, "FlashAttention-2", arXiv
2307.08691, algorithm 2, split in two as in Triton's fused-attention tutorial.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import compute_capability, tma_compatible
from ic.kernels.reference import document_bounds
from ic.kernels.triton_mla_attention_hopper import hopper_supports
from ic.kernels.widths import split_width

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mla_attention_delta_kernel(
    OUT, DOUT, DELTA, H, T,
    stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh,
    DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DELTA (B, H, T) fp32 = row sums of out * dout."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1) % H
    batch = (tl.program_id(1) // H).to(tl.int64)
    columns = tl.arange(0, DV)[None, :]
    inside = rows < T
    r64 = rows.to(tl.int64)[:, None]
    out_offset = batch * stride_ob + head.to(tl.int64) * stride_oh + r64 * stride_ot + columns
    grad_offset = batch * stride_gb + head.to(tl.int64) * stride_gh + r64 * stride_gt + columns
    out = tl.load(OUT + out_offset, mask=inside[:, None], other=0.0).to(tl.float32)
    dout = tl.load(DOUT + grad_offset, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(DELTA + (batch * H + head) * T + rows, tl.sum(out * dout, 1), mask=inside)


@triton.jit
def _key_step(
    dk1, dk2, dv, k1, k2, v, q_desc1, q_desc2, g_desc, LSE, DELTA, DOCUMENT_START,
    m0, keys, offset, T, scale_log2,
    MASKED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, D2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_M queries from m0 on to dk and dv. Scores are held transposed: (keys, queries)."""
    q1 = q_desc1.load([m0, 0])
    q2 = q_desc2.load([m0, 0])
    dout = g_desc.load([m0, 0])
    rows = m0 + tl.arange(0, BLOCK_M)
    # Rows past the end get p = exp2(-inf) = 0.
    lse = tl.load(LSE + rows, mask=rows < T, other=float("inf")) * LOG2_E
    delta = tl.load(DELTA + rows, mask=rows < T, other=0.0)
    s = tl.dot(k1, q1.T, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(k2, q2.T, s, input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[None, :])
    if MASKED:
        visible = keys[:, None] <= (rows + offset)[None, :]
        if HAS_DOCUMENTS:
            start = tl.load(DOCUMENT_START + offset + rows, mask=rows < T, other=0)
            visible &= keys[:, None] >= start[None, :]
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, dout.T, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q1.dtype)
    dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    if D2 > 0:
        dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit
def _bases(
    Q, K, V, DOUT, H, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb,
    stride_gh,
):  # fmt: skip
    """The program's head and batch row, and where its queries, keys, values and gradients begin."""
    head = tl.program_id(1) % H
    b64 = (tl.program_id(1) // H).to(tl.int64)
    h64 = head.to(tl.int64)
    return (
        head, b64, Q + b64 * stride_qb + h64 * stride_qh, K + b64 * stride_kb + h64 * stride_kh,
        V + b64 * stride_vb + h64 * stride_vh, DOUT + b64 * stride_gb + h64 * stride_gh,
    )  # fmt: skip


@triton.jit
def mla_attention_backward_kv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DVALUE, DOCUMENT_START, DOCUMENT_END, scale, scale_log2, H, T, S,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh, stride_dkt, stride_dvt,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The first keys are seen by the most queries: longest programs first, heads slow.
    n0 = tl.program_id(0) * BLOCK_N
    head, b64, q_base, k_base, v_base, g_base = _bases(
        Q, K, V, DOUT, H, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
        stride_gb, stride_gh,
    )  # fmt: skip
    offset = S - T
    q_desc1 = tl.make_tensor_descriptor(q_base, [T, D1], [stride_qt, 1], [BLOCK_M, D1])
    k_desc1 = tl.make_tensor_descriptor(k_base, [S, D1], [stride_kt, 1], [BLOCK_N, D1])
    v_desc = tl.make_tensor_descriptor(v_base, [S, DV], [stride_vt, 1], [BLOCK_N, DV])
    g_desc = tl.make_tensor_descriptor(g_base, [T, DV], [stride_gt, 1], [BLOCK_M, DV])
    k1 = k_desc1.load([n0, 0])
    k2 = k1
    q_desc2 = q_desc1
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = dk1
    if D2 > 0:
        q_desc2 = tl.make_tensor_descriptor(q_base + D1, [T, D2], [stride_qt, 1], [BLOCK_M, D2])
        k_desc2 = tl.make_tensor_descriptor(k_base + D1, [S, D2], [stride_kt, 1], [BLOCK_N, D2])
        k2 = k_desc2.load([n0, 0])
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
    v = v_desc.load([n0, 0])
    dv = tl.zeros([BLOCK_N, DV], tl.float32)

    keys = n0 + tl.arange(0, BLOCK_N)
    lse_base = LSE + (b64 * H + head) * T
    delta_base = DELTA + (b64 * H + head) * T
    starts = DOCUMENT_START + b64 * S
    # Queries that see the first key of the block, up to the first that sees all of it.
    begin = tl.maximum(n0 - offset, 0) // BLOCK_M * BLOCK_M
    diagonal_end = tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    end = T
    full_end = T
    if HAS_DOCUMENTS:
        ends = DOCUMENT_END + b64 * S
        end = tl.minimum(tl.load(ends + tl.minimum(n0 + BLOCK_N, S) - 1) - offset, T)
        full_end = tl.maximum(tl.load(ends + n0) - offset, 0) // BLOCK_M * BLOCK_M
    diagonal_end = tl.minimum(diagonal_end, tl.cdiv(tl.maximum(end, 0), BLOCK_M) * BLOCK_M)
    full_end = tl.maximum(full_end, diagonal_end)

    for m0 in tl.range(begin, diagonal_end, BLOCK_M):
        dk1, dk2, dv = _key_step(
            dk1, dk2, dv, k1, k2, v, q_desc1, q_desc2, g_desc, lse_base, delta_base, starts,
            m0, keys, offset, T, scale_log2, True, HAS_DOCUMENTS, BLOCK_M, D2, PRECISION,
        )  # fmt: skip
    for m0 in tl.range(diagonal_end, full_end, BLOCK_M):
        dk1, dk2, dv = _key_step(
            dk1, dk2, dv, k1, k2, v, q_desc1, q_desc2, g_desc, lse_base, delta_base, starts,
            m0, keys, offset, T, scale_log2, False, HAS_DOCUMENTS, BLOCK_M, D2, PRECISION,
        )  # fmt: skip
    if HAS_DOCUMENTS:
        for m0 in tl.range(full_end, end, BLOCK_M):
            dk1, dk2, dv = _key_step(
                dk1, dk2, dv, k1, k2, v, q_desc1, q_desc2, g_desc, lse_base, delta_base, starts,
                m0, keys, offset, T, scale_log2, True, True, BLOCK_M, D2, PRECISION,
            )  # fmt: skip

    # dk and dv are contiguous (B, S, H, .).
    k_row = (b64 * S * H + head) * (D1 + D2)
    dk_desc1 = tl.make_tensor_descriptor(DK + k_row, [S, D1], [stride_dkt, 1], [BLOCK_N, D1])
    dk_desc1.store([n0, 0], (dk1 * scale).to(DK.dtype.element_ty))
    if D2 > 0:
        dk_desc2 = tl.make_tensor_descriptor(
            DK + k_row + D1, [S, D2], [stride_dkt, 1], [BLOCK_N, D2]
        )
        dk_desc2.store([n0, 0], (dk2 * scale).to(DK.dtype.element_ty))
    dv_desc = tl.make_tensor_descriptor(
        DVALUE + (b64 * S * H + head) * DV, [S, DV], [stride_dvt, 1], [BLOCK_N, DV]
    )
    dv_desc.store([n0, 0], dv.to(DVALUE.dtype.element_ty))


@triton.jit
def key_bounds(
    DOCUMENT_START, b64, m0, rows, offset, T, S,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Keys of BLOCK_M queries from m0 on: where each query's document starts; blocks from `begin`
    are masked, from `full_begin` seen by every query, from `full_end` to `end` masked again."""
    pos_q = offset + rows
    end = tl.minimum(offset + m0 + BLOCK_M, S)
    full_end = (offset + m0 + 1) // BLOCK_N * BLOCK_N
    full_begin = 0
    begin = 0
    start_q = pos_q
    if HAS_DOCUMENTS:
        starts = DOCUMENT_START + b64 * S
        start_q = tl.load(starts + pos_q, mask=rows < T, other=0)
        begin = tl.load(starts + offset + m0) // BLOCK_N * BLOCK_N
        last_start = tl.load(starts + tl.minimum(offset + m0 + BLOCK_M, S) - 1)
        full_begin = tl.minimum(tl.cdiv(last_start, BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(full_begin, full_end)
    return start_q, begin, full_begin, full_end, end


@triton.jit
def _query_step(
    dq1, dq2, q1, q2, dout, lse, delta, k_desc1, k_desc2, v_desc, n0, pos_q, start_q, scale_log2,
    MASKED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr, D2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_N keys from n0 on to dq."""
    k1 = k_desc1.load([n0, 0])
    k2 = k_desc2.load([n0, 0])
    v = v_desc.load([n0, 0])
    s = tl.dot(q1, k1.T, input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(q2, k2.T, s, input_precision=PRECISION)
    dp = tl.dot(dout, v.T, input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    if MASKED:
        keys = n0 + tl.arange(0, BLOCK_N)
        visible = keys[None, :] <= pos_q[:, None]
        if HAS_DOCUMENTS:
            visible &= keys[None, :] >= start_q[:, None]
        p = tl.where(visible, p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    if D2 > 0:
        dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit
def mla_attention_backward_q_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, DOCUMENT_START, scale, scale_log2, H, T, S,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_gb, stride_gt, stride_gh, stride_dqt,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, b64, q_base, k_base, v_base, g_base = _bases(
        Q, K, V, DOUT, H, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
        stride_gb, stride_gh,
    )  # fmt: skip
    offset = S - T
    q_desc1 = tl.make_tensor_descriptor(q_base, [T, D1], [stride_qt, 1], [BLOCK_M, D1])
    k_desc1 = tl.make_tensor_descriptor(k_base, [S, D1], [stride_kt, 1], [BLOCK_N, D1])
    v_desc = tl.make_tensor_descriptor(v_base, [S, DV], [stride_vt, 1], [BLOCK_N, DV])
    g_desc = tl.make_tensor_descriptor(g_base, [T, DV], [stride_gt, 1], [BLOCK_M, DV])
    q1 = q_desc1.load([m0, 0])
    q2 = q1
    k_desc2 = k_desc1
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        q_desc2 = tl.make_tensor_descriptor(q_base + D1, [T, D2], [stride_qt, 1], [BLOCK_M, D2])
        k_desc2 = tl.make_tensor_descriptor(k_base + D1, [S, D2], [stride_kt, 1], [BLOCK_N, D2])
        q2 = q_desc2.load([m0, 0])
        dq2 = tl.zeros([BLOCK_M, D2], tl.float32)
    dout = g_desc.load([m0, 0])

    rows = m0 + tl.arange(0, BLOCK_M)
    pos_q = offset + rows
    row_base = (b64 * H + head) * T
    lse = tl.load(LSE + row_base + rows, mask=rows < T, other=float("inf")) * LOG2_E
    delta = tl.load(DELTA + row_base + rows, mask=rows < T, other=0.0)
    start_q, begin, full_begin, full_end, end = key_bounds(
        DOCUMENT_START, b64, m0, rows, offset, T, S, BLOCK_M, BLOCK_N, HAS_DOCUMENTS
    )
    if HAS_DOCUMENTS:
        for n0 in tl.range(begin, full_begin, BLOCK_N):
            dq1, dq2 = _query_step(
                dq1, dq2, q1, q2, dout, lse, delta, k_desc1, k_desc2, v_desc, n0, pos_q, start_q,
                scale_log2, True, True, BLOCK_N, D2, PRECISION,
            )  # fmt: skip
    for n0 in tl.range(full_begin, full_end, BLOCK_N):
        dq1, dq2 = _query_step(
            dq1, dq2, q1, q2, dout, lse, delta, k_desc1, k_desc2, v_desc, n0, pos_q, start_q,
            scale_log2, False, HAS_DOCUMENTS, BLOCK_N, D2, PRECISION,
        )  # fmt: skip
    for n0 in tl.range(full_end, end, BLOCK_N):
        dq1, dq2 = _query_step(
            dq1, dq2, q1, q2, dout, lse, delta, k_desc1, k_desc2, v_desc, n0, pos_q, start_q,
            scale_log2, True, HAS_DOCUMENTS, BLOCK_N, D2, PRECISION,
        )  # fmt: skip

    # dq is contiguous (B, T, H, D).
    q_row = (b64 * T * H + head) * (D1 + D2)
    dq_desc1 = tl.make_tensor_descriptor(DQ + q_row, [T, D1], [stride_dqt, 1], [BLOCK_M, D1])
    dq_desc1.store([m0, 0], (dq1 * scale).to(DQ.dtype.element_ty))
    if D2 > 0:
        dq_desc2 = tl.make_tensor_descriptor(
            DQ + q_row + D1, [T, D2], [stride_dqt, 1], [BLOCK_M, D2]
        )
        dq_desc2.store([m0, 0], (dq2 * scale).to(DQ.dtype.element_ty))


# (BLOCK_M, BLOCK_N, num_warps, num_stages) of the dk/dv and the dq kernel, keyed as in
# triton_mla_attention.py.
_BACKWARD_TILES: dict[
    int, dict[int, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]]
] = {
    0: {10**6: ((32, 32, 4, 1), (32, 32, 4, 1))},  # interpreter
    80: {192: ((32, 64, 8, 2), (64, 32, 8, 2)), 10**6: ((32, 32, 4, 2), (32, 64, 8, 2))},
    90: {192: ((64, 64, 8, 2), (64, 64, 4, 2)), 10**6: ((32, 64, 8, 2), (128, 64, 8, 2))},
    100: {192: ((64, 64, 8, 2), (64, 32, 4, 2)), 10**6: ((64, 64, 8, 3), (128, 64, 8, 2))},
}
_FP32_TILES = ((16, 32, 4, 1), (32, 16, 4, 1))


def backward_tiles(
    capability: int, width: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Tiles of the dk/dv and the dq kernel for a chip (90 for sm_90), D + V and the dtype."""
    if dtype == torch.float32 and capability:
        return _FP32_TILES
    table = _BACKWARD_TILES[max(c for c in _BACKWARD_TILES if c <= capability)]
    return next(tiles for limit, tiles in table.items() if width <= limit)


def set_descriptor_allocator(like: Tensor) -> None:
    """Tensor descriptors made on the device live in memory that Triton asks for at launch."""
    if like.is_cuda:
        device = like.device
        triton.set_allocator(
            lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device)
        )


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv (contiguous), given the forward pass's out and log-sum-exp."""
    num_batch, num_queries, num_heads, width = q.shape
    num_keys, v_width = v.shape[1], v.shape[-1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v = tma_compatible(q), tma_compatible(k), tma_compatible(v)
    dout = tma_compatible(dout if dout.stride(-1) == 1 else dout.contiguous())
    bounds = None if document_ids is None else document_bounds(document_ids)
    if hopper_supports(q, v):
        from ic.kernels.triton_mla_attention_hopper_backward import hopper_backward

        hopper_backward(dout, q, k, v, out, lse, dq, dk, dv, bounds, scale)
        return dq, dk, dv
    start, end = (q, q) if bounds is None else bounds
    d1, d2 = split_width(width)
    kv_tile, q_tile = backward_tiles(compute_capability(q), width + v_width, q.dtype)
    set_descriptor_allocator(q)
    delta = torch.empty_like(lse)
    bh = num_batch * num_heads
    mla_attention_delta_kernel[(triton.cdiv(num_queries, 32), bh)](
        out, dout, delta, num_heads, num_queries, *out.stride()[:3], *dout.stride()[:3],
        DV=v_width, BLOCK_M=32,
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (scale, scale * LOG2_E.value, num_heads, num_queries, num_keys)
    widths = {"D1": d1, "D2": d2, "DV": v_width}
    flags = {"HAS_DOCUMENTS": bounds is not None, "PRECISION": "ieee"}
    block_m, block_n, num_warps, num_stages = kv_tile
    mla_attention_backward_kv_kernel[(triton.cdiv(num_keys, block_n), bh)](
        q, k, v, dout, lse, delta, dk, dv, start, end, *sizes, *strides, dk.stride(1),
        dv.stride(1), **widths,
        BLOCK_M=block_m, BLOCK_N=block_n, **flags, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    block_m, block_n, num_warps, num_stages = q_tile
    mla_attention_backward_q_kernel[(triton.cdiv(num_queries, block_m), bh)](
        q, k, v, dout, lse, delta, dq, start, *sizes, *strides, dq.stride(1), **widths,
        BLOCK_M=block_m, BLOCK_N=block_n, **flags, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return dq, dk, dv
