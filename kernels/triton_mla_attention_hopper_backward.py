"""Causal attention, backward, for Hopper (sm_90) in Gluon: row statistics, then dk and dv, then dq.

The maths is that of triton_mla_attention_backward.py: no atomics, reproducible, the scores computed
twice.

In the dk/dv kernel two warpgroups of four warps own 64 keys each of the program's 128; scores are
held transposed, (keys, queries), so that p and ds enter their products from registers. One warp
copies 64 queries a step to shared memory. The accumulators of dk and dv take 160 registers a thread
at 192/128. What makes the rest fit in 240:

- the score accumulator starts from -lse / scale, and that of dout v^T from -delta: neither costs a
  register;
- a masked score starts from -inf, so the mask is gone before the exponentials;
- p is kept packed in 16 bits from the first product to the second.

Memory traffic, limits and shapes: as in triton_mla_attention_hopper.py. A NaN or infinity among the
inputs of one document can reach its neighbours in the same block: the mask is added to the scores'
accumulator, not selected, and a hidden pair's 0 times NaN is NaN in the products that follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ic.kernels.triton_mla_attention_hopper import LOG2_E, _tma_load, _tma_store, descriptor
from ic.kernels.triton_mla_attention_hopper_query import hopper_backward_q_kernel


@triton.jit
def hopper_row_statistics_kernel(
    OUT, DOUT, LSE, STATISTICS, H, T, inverse_scale,
    stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh, DV: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """STATISTICS (B H, cdiv(T, BLOCK), 2, BLOCK) fp32: -lse / scale, -inf past the end; then
    -rowsum(out dout).

    Both are what the accumulators of q.k and dout.v start from, so neither costs a register or an
    instruction."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    bh = batch * H + head
    columns = tl.arange(0, DV)[None, :]
    inside = rows < T
    r64 = rows.to(tl.int64)[:, None]
    out_offset = batch * stride_ob + head * stride_oh + r64 * stride_ot + columns
    grad_offset = batch * stride_gb + head * stride_gh + r64 * stride_gt + columns
    out = tl.load(OUT + out_offset, mask=inside[:, None], other=0.0).to(tl.float32)
    dout = tl.load(DOUT + grad_offset, mask=inside[:, None], other=0.0).to(tl.float32)
    lse = tl.load(LSE + bh * T + rows, mask=inside, other=float("inf"))
    block = (bh * tl.num_programs(0) + tl.program_id(0)) * 2 * BLOCK + tl.arange(0, BLOCK)
    tl.store(STATISTICS + block, -lse * inverse_scale)
    tl.store(STATISTICS + block + BLOCK, -tl.sum(out * dout, 1))


@gluon.jit
def _round_packed(x, DTYPE: gl.constexpr):
    """x.to(DTYPE) two at a time.

    A plain cast of a value with two uses is done one by one at a quarter of the rate, and the
    halves stay in a register each, which no longer fit.
    """
    if gl.bfloat16 == DTYPE:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def _widen_packed(x):
    """x.to(float32) from packed pairs."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=gl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}",
            "=r,=r,r", [x],
            dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def _query_range(
    T, S, offset, DOCUMENT_END, n0, b64, BLOCK_Q: gl.constexpr, HAS_DOCUMENTS: gl.constexpr
):
    """Query blocks of BLOCK_Q that see keys n0 .. n0 + 127.

    From `first`, [0, diagonal) are cut by the diagonal, [diagonal, whole) see all of them,
    [whole, total) are cut by a document's end.
    """
    first = gl.maximum(n0 - offset, 0) // BLOCK_Q
    end = T
    whole_end = T
    if HAS_DOCUMENTS:
        ends = DOCUMENT_END + b64 * S
        end = gl.minimum(gl.load(ends + gl.minimum(n0 + 127, S - 1)) - offset, T)
        whole_end = gl.maximum(gl.load(ends + n0) - offset, 0) // BLOCK_Q * BLOCK_Q
    total = gl.maximum(gl.cdiv(end, BLOCK_Q) - first, 0)
    diagonal = gl.minimum(gl.cdiv(gl.maximum(n0 + 127 - offset, 0), BLOCK_Q) - first, total)
    whole = total
    if HAS_DOCUMENTS:
        whole = gl.minimum(gl.maximum(whole_end // BLOCK_Q - first, diagonal), total)
    return first, diagonal, whole, total


@gluon.jit
def _kv_producer(q_desc1, q_desc2, k_desc1, k_desc2, v_desc, g_desc, STATISTICS, DOCUMENT_END, H,
    T, S, offset,
                 q1_s, q2_s, g_s, k1_s, k2_s, v_s, stats_s, kv_full, q_full, q_empty,
                 BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
                 HAS_DOCUMENTS: gl.constexpr):  # fmt: skip
    STATS: gl.constexpr = gl.BlockedLayout([BLOCK_Q // 16], [32], [1], [0])
    n0 = gl.program_id(0) * 128
    head = gl.program_id(1)
    batch = gl.program_id(2)
    b64 = batch.to(gl.int64)
    first, _a, _b, total = _query_range(T, S, offset, DOCUMENT_END, n0, b64, BLOCK_Q, HAS_DOCUMENTS)
    kv_bytes: gl.constexpr = 2 * (
        k_desc1.block_type.nbytes + k_desc2.block_type.nbytes + v_desc.block_type.nbytes
    )
    mbarrier.expect(kv_full, kv_bytes)
    for w in gl.static_range(2):
        _tma_load(k_desc1, [batch, head, n0 + 64 * w, 0], kv_full, k1_s.index(w))
        _tma_load(k_desc2, [batch, head, n0 + 64 * w, D1], kv_full, k2_s.index(w))
        _tma_load(v_desc, [batch, head, n0 + 64 * w, 0], kv_full, v_s.index(w))
    stats_base = STATISTICS + ((b64 * H + head) * gl.cdiv(T, BLOCK_Q) + first) * 2 * BLOCK_Q
    stats_offset = gl.arange(0, 2 * BLOCK_Q, STATS)
    q_bytes: gl.constexpr = (
        q_desc1.block_type.nbytes + q_desc2.block_type.nbytes + g_desc.block_type.nbytes
    )
    for i in range(total):
        stage = i % STAGES
        m0 = (first + i) * BLOCK_Q
        bar = q_full.index(stage)
        statistics = gl.load(stats_base + i * 2 * BLOCK_Q + stats_offset)
        mbarrier.wait(q_empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, q_bytes)
        _tma_load(q_desc1, [batch, head, m0, 0], bar, q1_s.index(stage))
        _tma_load(q_desc2, [batch, head, m0, D1], bar, q2_s.index(stage))
        _tma_load(g_desc, [batch, head, m0, 0], bar, g_s.index(stage))
        stats_s.index(stage).store(statistics)
        mbarrier.arrive(bar, count=1)


@gluon.jit
def _kv_consumer(dk_desc1, dk_desc2, dv_desc, DOCUMENT_END, scale, scale_log2, H, T, S, offset,
                 q1_s, q2_s, g_s, k1_s, k2_s, v_s, stats_s, kv_full, q_full, q_empty,
                 WARPGROUP: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
                 D1: gl.constexpr, D2: gl.constexpr,
                 DV: gl.constexpr, HAS_DOCUMENTS: gl.constexpr):  # fmt: skip
    DTYPE: gl.constexpr = v_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LV, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    n0 = gl.program_id(0) * 128
    head = gl.program_id(1)
    batch = gl.program_id(2)
    b64 = batch.to(gl.int64)
    first, diagonal, whole, total = _query_range(
        T, S, offset, DOCUMENT_END, n0, b64, BLOCK_Q, HAS_DOCUMENTS
    )
    k1 = k1_s.index(WARPGROUP).reshape([64, D1])
    k2 = k2_s.index(WARPGROUP).reshape([64, D2])
    v = v_s.index(WARPGROUP).reshape([64, DV])
    dk1 = gl.zeros([64, D1], gl.float32, L1)
    dk2 = gl.zeros([64, D2], gl.float32, L2)
    dv = gl.zeros([64, DV], gl.float32, LV)
    zero = gl.zeros([64, BLOCK_Q], gl.float32, S_LAYOUT)
    mbarrier.wait(kv_full, 0)
    stage = 0
    phase = 0

    for i in range(total):
        q1 = q1_s.index(stage).reshape([BLOCK_Q, D1])
        q2 = q2_s.index(stage).reshape([BLOCK_Q, D2])
        dout = g_s.index(stage).reshape([BLOCK_Q, DV])
        stats = stats_s.index(stage)
        mbarrier.wait(q_full.index(stage), phase)
        start = gl.broadcast(gl.expand_dims(stats.slice(0, BLOCK_Q).load(COLUMN), 0), zero)[0]
        if (i < diagonal) | (i >= whole):  # a masked score starts, and so ends, at -inf
            keys = n0 + 64 * WARPGROUP + gl.arange(0, 64, ROW)
            pos_q = gl.expand_dims(
                offset + (first + i) * BLOCK_Q + gl.arange(0, BLOCK_Q, COLUMN), 0
            )
            visible = gl.expand_dims(keys, 1) <= pos_q
            if HAS_DOCUMENTS:  # loaded here: held through the main loop it would cost registers
                key_end = gl.load(DOCUMENT_END + b64 * S + keys, mask=keys < S, other=0)
                visible = visible & (gl.expand_dims(key_end, 1) > pos_q)
            start = gl.where(visible, start, float("-inf"))
        s_token = warpgroup_mma(k1, q1.permute([1, 0]), start, is_async=True)
        s_token = warpgroup_mma(k2, q2.permute([1, 0]), s_token, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s_token])
        p = gl.exp2(s * scale_log2)
        p_half = _round_packed(p, DTYPE)
        p16 = gl.convert_layout(p_half, P_LAYOUT)
        dv = warpgroup_mma(p16, dout, dv, is_async=True)
        neg_delta = gl.expand_dims(stats.slice(BLOCK_Q, BLOCK_Q).load(COLUMN), 0)
        dp_token = warpgroup_mma(
            v, dout.permute([1, 0]), gl.broadcast(neg_delta, zero)[0], is_async=True
        )
        dp, dv = warpgroup_mma_wait(0, deps=[dp_token, dv])
        ds = _round_packed(_widen_packed(p_half) * dp, DTYPE)
        dk1 = warpgroup_mma(
            gl.convert_layout(ds, gl.DotOperandLayout(0, L1, 2)), q1, dk1, is_async=True
        )
        dk2 = warpgroup_mma(
            gl.convert_layout(ds, gl.DotOperandLayout(0, L2, 2)), q2, dk2, is_async=True
        )
        dk1, dk2 = warpgroup_mma_wait(0, deps=[dk1, dk2])
        mbarrier.arrive(q_empty.index(stage), count=1)
        wrap = stage == STAGES - 1
        stage = gl.where(wrap, 0, stage + 1)
        phase = gl.where(wrap, phase ^ 1, phase)

    dk_s1 = k1_s.index(WARPGROUP)
    dk_s2 = k2_s.index(WARPGROUP)
    dv_s = v_s.index(WARPGROUP)
    dk_s1.reshape([64, D1]).store((dk1 * scale).to(DTYPE))
    dk_s2.reshape([64, D2]).store((dk2 * scale).to(DTYPE))
    dv_s.reshape([64, DV]).store(dv.to(DTYPE))
    fence_async_shared()
    _tma_store(dk_desc1, [batch, head, n0 + 64 * WARPGROUP, 0], dk_s1)
    _tma_store(dk_desc2, [batch, head, n0 + 64 * WARPGROUP, D1], dk_s2)
    _tma_store(dv_desc, [batch, head, n0 + 64 * WARPGROUP, 0], dv_s)
    tma.store_wait(0)


@gluon.jit
def hopper_backward_kv_kernel(q_desc1, q_desc2, k_desc1, k_desc2, v_desc, g_desc, dk_desc1,
    dk_desc2, dv_desc,
                              STATISTICS, DOCUMENT_END, scale, scale_log2, H, T, S, offset,
                              BLOCK_Q: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
                              D2: gl.constexpr,
                              DV: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
                              CONSUMER_REGISTERS: gl.constexpr,
                              PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    DTYPE: gl.constexpr = q_desc1.dtype
    k1_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D1], k_desc1.layout)
    k2_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D2], k_desc2.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DV], v_desc.layout)
    q1_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_Q, D1], q_desc1.layout)
    q2_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_Q, D2], q_desc2.layout)
    g_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_Q, DV], g_desc.layout)
    stats_s = gl.allocate_shared_memory(
        gl.float32, [STAGES, 2 * BLOCK_Q], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)  # the copies and the producer's plain stores
        mbarrier.init(q_empty.index(i), count=2)  # two consumer warpgroups
    fence_async_shared()
    gl.warp_specialize(
        [
            (_kv_consumer, (dk_desc1, dk_desc2, dv_desc, DOCUMENT_END, scale, scale_log2, H, T, S,
            offset,
                            q1_s, q2_s, g_s, k1_s, k2_s, v_s, stats_s, kv_full, q_full, q_empty,
                            0, BLOCK_Q, STAGES, D1, D2, DV, HAS_DOCUMENTS)),
            (_kv_consumer, (dk_desc1, dk_desc2, dv_desc, DOCUMENT_END, scale, scale_log2, H, T, S,
            offset,
                            q1_s, q2_s, g_s, k1_s, k2_s, v_s, stats_s, kv_full, q_full, q_empty,
                            1, BLOCK_Q, STAGES, D1, D2, DV, HAS_DOCUMENTS)),
            (_kv_producer, (q_desc1, q_desc2, k_desc1, k_desc2, v_desc, g_desc, STATISTICS,
            DOCUMENT_END,
                            H, T, S, offset, q1_s, q2_s, g_s, k1_s, k2_s, v_s, stats_s, kv_full,
                            q_full, q_empty, BLOCK_Q, STAGES, D1, HAS_DOCUMENTS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# Queries a step of the dk/dv kernel and its buffers; keys a step of the dq kernel and its buffers.
# After 3.6 Triton calls ptxas 13 with --regAllocOptLevel=2, which keeps the addresses of the keys'
# tiles in registers of each thread (26 too many at 64 queries) instead of in the warp's.
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_QUERY_BLOCK = 64 if _TRITON <= (3, 6) else 32
_QUERY_STAGES = 3
_KEY_BLOCK = 64
_KEY_STAGES = 3


def hopper_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, document_bounds: tuple[Tensor, Tensor] | None, scale: float,
) -> None:  # fmt: skip
    """Fill dq, dk and dv."""
    num_batch, num_queries, num_heads, width = q.shape
    num_keys, v_width = v.shape[1], v.shape[-1]
    d1, d2 = v_width, width - v_width
    num_blocks = triton.cdiv(num_queries, _QUERY_BLOCK)
    statistics = torch.empty(
        (num_batch * num_heads, num_blocks, 2, _QUERY_BLOCK), dtype=torch.float32, device=q.device
    )
    hopper_row_statistics_kernel[(num_blocks, num_heads, num_batch)](
        out, dout, lse, statistics, num_heads, num_queries, 1.0 / scale, *out.stride()[:3],
        *dout.stride()[:3], DV=v_width, BLOCK=_QUERY_BLOCK,
    )  # fmt: skip
    start, end = (lse, lse) if document_bounds is None else document_bounds
    sizes = (scale, scale * LOG2_E, num_heads, num_queries, num_keys, num_keys - num_queries)
    common = {
        "D1": d1, "D2": d2, "DV": v_width, "HAS_DOCUMENTS": document_bounds is not None,
        "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24, "num_warps": 4, "maxnreg": 168,
    }  # fmt: skip
    rows = _QUERY_BLOCK
    hopper_backward_kv_kernel[(triton.cdiv(num_keys, 128), num_heads, num_batch)](
        descriptor(q, rows, d1), descriptor(q, rows, d2), descriptor(k, 64, d1), descriptor(k, 64,
        d2),
        descriptor(v, 64, v_width), descriptor(dout, rows, v_width), descriptor(dk, 64, d1),
        descriptor(dk, 64, d2), descriptor(dv, 64, v_width), statistics, end, *sizes,
        BLOCK_Q=rows, STAGES=_QUERY_STAGES, **common,
    )  # fmt: skip
    hopper_backward_q_kernel[(triton.cdiv(num_queries, 128), num_heads, num_batch)](
        descriptor(q, 64, d1), descriptor(q, 64, d2), descriptor(k, _KEY_BLOCK, d1),
        descriptor(k, _KEY_BLOCK, d2), descriptor(v, _KEY_BLOCK, v_width), descriptor(dout, 64,
        v_width), descriptor(dq, 64, d1),
        descriptor(dq, 64, d2), statistics, start, *sizes,
        STATISTICS_BLOCK=rows, BLOCK_N=_KEY_BLOCK, STAGES=_KEY_STAGES, **common,
    )  # fmt: skip
