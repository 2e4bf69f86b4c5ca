"""Causal attention, gradient of the queries, for Hopper (sm_90) in Gluon.

    dq_t = scale * sum_s ds_ts k_s,   ds_ts = p_ts (dout_t . v_s - delta_t)

Two warpgroups of four warps own 64 queries each of the program's 128 and keep dq in registers; one
warp walks over the visible key blocks from the last to the first and copies them to shared memory
with the TMA engine. A warpgroup issues the products q k^T and dout v^T of a block before the
product ds k of the block before it, so the exponentials of one block run under the matrix product
of the other. ds goes into the product from registers.

Bounds, masks and limits: as in triton_mla_attention_hopper.py; launched by
triton_mla_attention_hopper_backward.py. Source: Shah et al., "FlashAttention-3", arXiv 2407.08608,
for the overlap.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ic.kernels.triton_mla_attention_hopper import (
    _tma_load,
    _tma_store,
    key_barriers,
    load_keys,
    part_bounds,
)


@gluon.jit
def _key_range(
    T, S, offset, DOCUMENT_START, m0, b64, BLOCK_N: gl.constexpr, HAS_DOCUMENTS: gl.constexpr
):
    """Key blocks seen by queries m0 .. m0 + 127, from the last to the first.

    Iterations [0, right) are cut by the diagonal, [right, left) are visible as a whole,
    [left, total) are cut by a document's start.
    """
    last = gl.cdiv(gl.minimum(offset + m0 + 128, S), BLOCK_N) - 1
    first = 0
    full_first = 0
    if HAS_DOCUMENTS:
        starts = DOCUMENT_START + b64 * S + offset
        first = gl.load(starts + m0) // BLOCK_N
        full_first = gl.cdiv(gl.load(starts + gl.minimum(m0 + 128, T) - 1), BLOCK_N)
    total = last - first + 1
    right = gl.minimum(gl.maximum(last - (offset + m0 + 1) // BLOCK_N + 1, 1), total)
    left = gl.minimum(gl.maximum(last - full_first + 1, right), total)
    return last, right, left, total


@gluon.jit
def _q_producer(q_desc1, q_desc2, k_desc1, k_desc2, v_desc, g_desc, DOCUMENT_START, H, T, S, offset,
                q1_s, q2_s, g_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                BLOCK_N: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
                HAS_DOCUMENTS: gl.constexpr):  # fmt: skip
    m0 = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    batch = gl.program_id(2)
    last, _right, _left, total = _key_range(
        T, S, offset, DOCUMENT_START, m0, batch.to(gl.int64), BLOCK_N, HAS_DOCUMENTS
    )
    q_bytes: gl.constexpr = 2 * (
        q_desc1.block_type.nbytes + q_desc2.block_type.nbytes + g_desc.block_type.nbytes
    )
    mbarrier.expect(q_full, q_bytes)
    for w in gl.static_range(2):
        _tma_load(q_desc1, [batch, head, m0 + 64 * w, 0], q_full, q1_s.index(w))
        _tma_load(q_desc2, [batch, head, m0 + 64 * w, D1], q_full, q2_s.index(w))
        _tma_load(g_desc, [batch, head, m0 + 64 * w, 0], q_full, g_s.index(w))
    load_keys(k_desc1, k_desc2, v_desc, k1_s, k2_s, v_s, k_full, k_empty, v_full, v_empty,
              batch, head, last, total, BLOCK_N, STAGES, D1)  # fmt: skip


@gluon.jit
def _score_gradient(s, dp, neg_lse, neg_delta, scale_log2, pos_q, start_q, n0, MASKED: gl.constexpr,
                    HAS_DOCUMENTS: gl.constexpr, BLOCK_N: gl.constexpr,
                    LAYOUT: gl.constexpr):  # fmt: skip
    p = gl.exp2(s * scale_log2 + gl.expand_dims(neg_lse, 1))
    if MASKED:
        keys = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        visible = gl.expand_dims(keys, 0) <= gl.expand_dims(pos_q, 1)
        if HAS_DOCUMENTS:
            visible = visible & (gl.expand_dims(keys, 0) >= gl.expand_dims(start_q, 1))
        p = gl.where(visible, p, 0.0)
    return p * (dp + gl.expand_dims(neg_delta, 1))


@gluon.jit
def _q_consumer(dq_desc1, dq_desc2, STATISTICS, DOCUMENT_START, scale, scale_log2, H, T, S, offset,
                q1_s, q2_s, g_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                WARPGROUP: gl.constexpr, STATISTICS_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
                STAGES: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr,
                HAS_DOCUMENTS: gl.constexpr):  # fmt: skip
    DTYPE: gl.constexpr = v_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    m0 = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    batch = gl.program_id(2)
    b64 = batch.to(gl.int64)
    last, right, left, total = _key_range(
        T, S, offset, DOCUMENT_START, m0, b64, BLOCK_N, HAS_DOCUMENTS
    )
    rows = m0 + 64 * WARPGROUP + gl.arange(0, 64, ROW)
    pos_q = offset + rows
    inside = rows < T
    start_q = pos_q
    if HAS_DOCUMENTS:
        start_q = gl.load(DOCUMENT_START + b64 * S + pos_q, mask=inside, other=0)
    stats = STATISTICS + (b64 * H + head) * gl.cdiv(T, STATISTICS_BLOCK) * 2 * STATISTICS_BLOCK
    where = rows // STATISTICS_BLOCK * 2 * STATISTICS_BLOCK + rows % STATISTICS_BLOCK
    neg_lse = gl.load(stats + where, mask=inside, other=float("-inf")) * scale_log2
    neg_delta = gl.load(stats + where + STATISTICS_BLOCK, mask=inside, other=0.0)
    q1 = q1_s.index(WARPGROUP).reshape([64, D1])
    q2 = q2_s.index(WARPGROUP).reshape([64, D2])
    dout = g_s.index(WARPGROUP).reshape([64, DV])
    dq1 = gl.zeros([64, D1], gl.float32, L1)
    dq2 = gl.zeros([64, D2], gl.float32, L2)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    k1 = k1_s.index(0).reshape([BLOCK_N, D1])
    k2 = k2_s.index(0).reshape([BLOCK_N, D2])
    s_token = warpgroup_mma(q1, k1.permute([1, 0]), zero, use_acc=False, is_async=True)
    s_token = warpgroup_mma(q2, k2.permute([1, 0]), s_token, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    v = v_s.index(0).reshape([BLOCK_N, DV])
    dp_token = warpgroup_mma(dout, v.permute([1, 0]), zero, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=[s_token, dp_token])
    mbarrier.arrive(v_empty.index(0), count=1)
    ds = _score_gradient(s, dp, neg_lse, neg_delta, scale_log2, pos_q, start_q, last * BLOCK_N,
    True,
                         HAS_DOCUMENTS, BLOCK_N, S_LAYOUT).to(DTYPE)  # fmt: skip

    for part in gl.static_range(3 if HAS_DOCUMENTS else 2):
        lo, hi = part_bounds(part, right, left, total)
        for i in range(lo, hi):
            stage = i % STAGES
            previous = (i - 1) % STAGES
            k1 = k1_s.index(stage).reshape([BLOCK_N, D1])
            k2 = k2_s.index(stage).reshape([BLOCK_N, D2])
            v = v_s.index(stage).reshape([BLOCK_N, DV])
            phase = (i // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s_token = warpgroup_mma(q1, k1.permute([1, 0]), zero, use_acc=False, is_async=True)
            s_token = warpgroup_mma(q2, k2.permute([1, 0]), s_token, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            dp_token = warpgroup_mma(dout, v.permute([1, 0]), zero, use_acc=False, is_async=True)
            k1 = k1_s.index(previous).reshape([BLOCK_N, D1])
            k2 = k2_s.index(previous).reshape([BLOCK_N, D2])
            dq1 = warpgroup_mma(
                gl.convert_layout(ds, gl.DotOperandLayout(0, L1, 2)), k1, dq1, is_async=True
            )
            dq2 = warpgroup_mma(
                gl.convert_layout(ds, gl.DotOperandLayout(0, L2, 2)), k2, dq2, is_async=True
            )
            s, dp = warpgroup_mma_wait(2, deps=[s_token, dp_token])
            mbarrier.arrive(v_empty.index(stage), count=1)
            ds32 = _score_gradient(s, dp, neg_lse, neg_delta, scale_log2, pos_q, start_q,
                                   (last - i) * BLOCK_N, part != 1, HAS_DOCUMENTS, BLOCK_N,
                                   S_LAYOUT)  # fmt: skip
            dq1, dq2 = warpgroup_mma_wait(0, deps=[dq1, dq2])
            mbarrier.arrive(k_empty.index(previous), count=1)
            ds = ds32.to(DTYPE)

    previous = (total - 1) % STAGES
    k1 = k1_s.index(previous).reshape([BLOCK_N, D1])
    k2 = k2_s.index(previous).reshape([BLOCK_N, D2])
    dq1 = warpgroup_mma(
        gl.convert_layout(ds, gl.DotOperandLayout(0, L1, 2)), k1, dq1, is_async=True
    )
    dq2 = warpgroup_mma(
        gl.convert_layout(ds, gl.DotOperandLayout(0, L2, 2)), k2, dq2, is_async=True
    )
    dq1, dq2 = warpgroup_mma_wait(0, deps=[dq1, dq2])

    dq_s1 = q1_s.index(WARPGROUP)
    dq_s2 = q2_s.index(WARPGROUP)
    dq_s1.reshape([64, D1]).store((dq1 * scale).to(DTYPE))
    dq_s2.reshape([64, D2]).store((dq2 * scale).to(DTYPE))
    fence_async_shared()
    _tma_store(dq_desc1, [batch, head, m0 + 64 * WARPGROUP, 0], dq_s1)
    _tma_store(dq_desc2, [batch, head, m0 + 64 * WARPGROUP, D1], dq_s2)
    tma.store_wait(0)


@gluon.jit
def hopper_backward_q_kernel(q_desc1, q_desc2, k_desc1, k_desc2, v_desc, g_desc, dq_desc1, dq_desc2,
                             STATISTICS, DOCUMENT_START, scale, scale_log2, H, T, S, offset,
                             STATISTICS_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
                             STAGES: gl.constexpr,
                             D1: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr,
                             HAS_DOCUMENTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
                             PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    DTYPE: gl.constexpr = q_desc1.dtype
    q1_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D1], q_desc1.layout)
    q2_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D2], q_desc2.layout)
    g_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DV], g_desc.layout)
    k1_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D1], k_desc1.layout)
    k2_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D2], k_desc2.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, DV], v_desc.layout)
    q_full, k_full, k_empty, v_full, v_empty = key_barriers(STAGES)
    gl.warp_specialize(
        [
            (_q_consumer, (dq_desc1, dq_desc2, STATISTICS, DOCUMENT_START, scale, scale_log2, H, T,
            S, offset,
                           q1_s, q2_s, g_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full,
                           v_empty,
                           0, STATISTICS_BLOCK, BLOCK_N, STAGES, D1, D2, DV, HAS_DOCUMENTS)),
            (_q_consumer, (dq_desc1, dq_desc2, STATISTICS, DOCUMENT_START, scale, scale_log2, H, T,
            S, offset,
                           q1_s, q2_s, g_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full,
                           v_empty,
                           1, STATISTICS_BLOCK, BLOCK_N, STAGES, D1, D2, DV, HAS_DOCUMENTS)),
            (_q_producer, (q_desc1, q_desc2, k_desc1, k_desc2, v_desc, g_desc, DOCUMENT_START, H,
            T, S, offset,
                           q1_s, q2_s, g_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full,
                           v_empty,
                           BLOCK_N, STAGES, D1, HAS_DOCUMENTS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
