"""Causal attention, forward, for Hopper (sm_90) in Gluon: what Triton's own pipeliner does not
reach there.

The maths, the masks and the shapes are those of triton_mla_attention.py. A program owns 128 queries
of one head. Two warpgroups of four warps hold 64 queries each; one more warp copies blocks of 128
keys and values to shared memory with the TMA engine, two ahead. A warpgroup issues q k^T of a block
before p v of the block before it and computes the softmax of the one under the product of the
other; the other warpgroup fills what is left. Key blocks are walked from the last to the first, so
that the block on the diagonal, the only one that needs the mask, comes first.

Memory traffic: as in triton_mla_attention.py; k and v are read from L2 once for 128 queries.
Limits: sm_90, fp16 and bf16, 192/128, 128/64 (a converted model of heads of 64) and 96/64; other
shapes take the portable kernel.
Source: Shah et al., "FlashAttention-3", arXiv 2407.08608.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ic.kernels.arguments import HALF, compute_capability

# Triton 3.9 renamed the copies.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _forward_range(T, S, DOCUMENT_START, m0, b64, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                   HAS_DOCUMENTS: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """Key blocks are walked from the last to the first: iterations [0, right) are cut by the
    diagonal, [right, left) are visible as a whole, [left, total) are cut by a document's start.
    Where all keys are visible only the last block is cut, by their end."""
    offset = S - T
    last = gl.cdiv(gl.minimum(offset + m0 + BLOCK_M, S), BLOCK_N) - 1
    first = 0
    full_first = 0
    if not CAUSAL:
        last = gl.cdiv(S, BLOCK_N) - 1
    if HAS_DOCUMENTS:
        starts = DOCUMENT_START + b64 * S + offset
        first = gl.load(starts + m0) // BLOCK_N
        full_first = gl.cdiv(gl.load(starts + gl.minimum(m0 + BLOCK_M, T) - 1), BLOCK_N)
    total = last - first + 1
    right = gl.minimum(gl.maximum(last - (offset + m0 + 1) // BLOCK_N + 1, 1), total)
    if not CAUSAL:
        right = total * 0 + 1
    left = gl.minimum(gl.maximum(last - full_first + 1, right), total)
    return last, right, left, total


@gluon.jit
def key_barriers(STAGES: gl.constexpr):
    """Barriers of a kernel that keeps its queries and streams keys and values through STAGES
    buffers to two consumer warpgroups: q_full, k_full, k_empty, v_full, v_empty."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    return q_full, k_full, k_empty, v_full, v_empty


@gluon.jit
def load_keys(k_desc1, k_desc2, v_desc, k1_s, k2_s, v_s, k_full, k_empty, v_full, v_empty,
              batch, head, last, total, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
              D1: gl.constexpr):  # fmt: skip
    """Stream `total` blocks of keys and values, from block `last` down."""
    for i in range(total):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        n0 = (last - i) * BLOCK_N
        k_bar = k_full.index(stage)
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_bar, k_desc1.block_type.nbytes + k_desc2.block_type.nbytes)
        _tma_load(k_desc1, [batch, head, n0, 0], k_bar, k1_s.index(stage))
        _tma_load(k_desc2, [batch, head, n0, D1], k_bar, k2_s.index(stage))
        v_bar = v_full.index(stage)
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_bar, v_desc.block_type.nbytes)
        _tma_load(v_desc, [batch, head, n0, 0], v_bar, v_s.index(stage))


@gluon.jit
def _forward_producer(q_desc1, q_desc2, k_desc1, k_desc2, v_desc, T, S, DOCUMENT_START,
                      q1_s, q2_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                      BLOCK_N: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
                      HAS_DOCUMENTS: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    m0 = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    batch = gl.program_id(2)
    last, _right, _left, total = _forward_range(
        T, S, DOCUMENT_START, m0, batch.to(gl.int64), 128, BLOCK_N, HAS_DOCUMENTS, CAUSAL
    )
    mbarrier.expect(q_full, 2 * (q_desc1.block_type.nbytes + q_desc2.block_type.nbytes))
    for w in gl.static_range(2):
        _tma_load(q_desc1, [batch, head, m0 + 64 * w, 0], q_full, q1_s.index(w))
        _tma_load(q_desc2, [batch, head, m0 + 64 * w, D1], q_full, q2_s.index(w))
    load_keys(k_desc1, k_desc2, v_desc, k1_s, k2_s, v_s, k_full, k_empty, v_full, v_empty,
              batch, head, last, total, BLOCK_N, STAGES, D1)  # fmt: skip


@gluon.jit
def part_bounds(PART: gl.constexpr, right, left, total):
    """Key blocks of a loop's part: masked at the right end, whole, masked at the left end."""
    if PART == 0:
        lo = 1
        hi = right
    elif PART == 1:
        lo = right
        hi = left
    else:
        lo = left
        hi = total
    return lo, hi


@gluon.jit
def _scores(q1, q2, k1, k2, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, D1: gl.constexpr,
            D2: gl.constexpr):  # fmt: skip
    zero = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    s = warpgroup_mma(
        q1, k1.reshape([BLOCK_N, D1]).permute([1, 0]), zero, use_acc=False, is_async=True
    )
    return warpgroup_mma(q2, k2.reshape([BLOCK_N, D2]).permute([1, 0]), s, is_async=True)


@gluon.jit
def _mask(
    s, n0, pos_q, start_q, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, HAS_DOCUMENTS: gl.constexpr
):
    keys = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    visible = gl.expand_dims(keys, 0) <= gl.expand_dims(pos_q, 1)
    if HAS_DOCUMENTS:
        visible = visible & (gl.expand_dims(keys, 0) >= gl.expand_dims(start_q, 1))
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _forward_consumer(out_desc, LSE, DOCUMENT_START, scale_log2, H, T, S,
                      q1_s, q2_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                      WARPGROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                      D1: gl.constexpr, D2: gl.constexpr, DV: gl.constexpr,
                      HAS_DOCUMENTS: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    DTYPE: gl.constexpr = v_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    m0 = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    batch = gl.program_id(2)
    b64 = batch.to(gl.int64)
    last, right, left, total = _forward_range(
        T, S, DOCUMENT_START, m0, b64, 128, BLOCK_N, HAS_DOCUMENTS, CAUSAL
    )
    rows = m0 + 64 * WARPGROUP + gl.arange(0, 64, ROW)
    pos_q = S - T + rows
    if not CAUSAL:
        pos_q = rows * 0 + (S - 1)
    start_q = pos_q
    if HAS_DOCUMENTS:
        start_q = gl.load(DOCUMENT_START + b64 * S + pos_q, mask=rows < T, other=0)
    q1 = q1_s.index(WARPGROUP).reshape([64, D1])
    q2 = q2_s.index(WARPGROUP).reshape([64, D2])

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s_token = _scores(q1, q2, k1_s.index(0), k2_s.index(0), S_LAYOUT, BLOCK_N, D1, D2)
    s = warpgroup_mma_wait(0, deps=[s_token])
    mbarrier.arrive(k_empty.index(0), count=1)
    s = _mask(s, last * BLOCK_N, pos_q, start_q, S_LAYOUT, BLOCK_N, HAS_DOCUMENTS)
    row_max = gl.max(s, 1) * scale_log2
    shift = gl.where(row_max == float("-inf"), 0.0, row_max)  # a row may see no key of this block
    p32 = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
    row_sum = gl.sum(p32, 1)
    p = gl.convert_layout(p32.to(DTYPE), P_LAYOUT)
    acc = gl.zeros([64, DV], gl.float32, O_LAYOUT)

    for part in gl.static_range(3 if HAS_DOCUMENTS else 2):
        lo, hi = part_bounds(part, right, left, total)
        for i in range(lo, hi):
            stage = i % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            s_token = _scores(
                q1, q2, k1_s.index(stage), k2_s.index(stage), S_LAYOUT, BLOCK_N, D1, D2
            )
            v_stage = (i - 1) % STAGES
            mbarrier.wait(v_full.index(v_stage), ((i - 1) // STAGES) & 1)
            acc_token = warpgroup_mma(
                p, v_s.index(v_stage).reshape([BLOCK_N, DV]), acc, is_async=True
            )
            s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if part != 1:
                s = _mask(s, (last - i) * BLOCK_N, pos_q, start_q, S_LAYOUT, BLOCK_N, HAS_DOCUMENTS)
            new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
            shift = new_max
            if part != 1:
                shift = gl.where(new_max == float("-inf"), 0.0, new_max)
            alpha = gl.exp2(row_max - shift)
            p32 = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
            row_sum = row_sum * alpha + gl.sum(p32, 1)
            row_max = new_max
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW), 1)
            p = gl.convert_layout(p32.to(DTYPE), P_LAYOUT)

    v_stage = (total - 1) % STAGES
    mbarrier.wait(v_full.index(v_stage), ((total - 1) // STAGES) & 1)
    acc_token = warpgroup_mma(p, v_s.index(v_stage).reshape([BLOCK_N, DV]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc_token])

    acc = acc / gl.expand_dims(gl.convert_layout(row_sum, O_ROW), 1)
    lse = (row_max + gl.log2(row_sum)) * LN_2
    gl.store(LSE + (b64 * H + head) * T + rows, lse, mask=rows < T)
    # This warpgroup's queries are no longer needed: their buffer carries the output (D1 == DV).
    out_s = q1_s.index(WARPGROUP)
    out_s.reshape([64, DV]).store(acc.to(DTYPE))
    fence_async_shared()
    _tma_store(out_desc, [batch, head, m0 + 64 * WARPGROUP, 0], out_s)
    tma.store_wait(0)


@gluon.jit
def hopper_forward_kernel(q_desc1, q_desc2, k_desc1, k_desc2, v_desc, out_desc, LSE, DOCUMENT_START,
                          scale_log2, H, T, S,
                          BLOCK_N: gl.constexpr, STAGES: gl.constexpr, D1: gl.constexpr,
                          D2: gl.constexpr, DV: gl.constexpr,
                          HAS_DOCUMENTS: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    DTYPE: gl.constexpr = q_desc1.dtype
    q1_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D1], q_desc1.layout)
    q2_s = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, D2], q_desc2.layout)
    k1_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D1], k_desc1.layout)
    k2_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D2], k_desc2.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, DV], v_desc.layout)
    q_full, k_full, k_empty, v_full, v_empty = key_barriers(STAGES)
    gl.warp_specialize(
        [
            (_forward_consumer, (out_desc, LSE, DOCUMENT_START, scale_log2, H, T, S,
                                 q1_s, q2_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full,
                                 v_empty,
                                 0, BLOCK_N, STAGES, D1, D2, DV, HAS_DOCUMENTS, CAUSAL)),
            (_forward_consumer, (out_desc, LSE, DOCUMENT_START, scale_log2, H, T, S,
                                 q1_s, q2_s, k1_s, k2_s, v_s, q_full, k_full, k_empty, v_full,
                                 v_empty,
                                 1, BLOCK_N, STAGES, D1, D2, DV, HAS_DOCUMENTS, CAUSAL)),
            (_forward_producer, (q_desc1, q_desc2, k_desc1, k_desc2, v_desc, T, S, DOCUMENT_START,
                                 q1_s, q2_s, k1_s, k2_s, v_s, q_full, k_full, k_empty,
                                 v_full, v_empty, BLOCK_N, STAGES, D1, HAS_DOCUMENTS, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


LOG2_E = 1.4426950408889634
# Keys a step and buffers.
_FORWARD_TILE = (128, 2)
_GLUON_DTYPE = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def hopper_supports(q: Tensor, v: Tensor) -> bool:
    """Whether the Gluon kernels take these tensors: sm_90, 16 bits and their widths."""
    widths = (q.shape[-1], v.shape[-1])
    return (
        q.dtype in HALF
        and widths in ((192, 128), (128, 64), (96, 64))
        and compute_capability(q) == 90
        and os.environ.get("IC_HOPPER_KERNELS", "1") == "1"
    )


@functools.cache
def _layout(num_rows: int, num_columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, num_rows, num_columns], _GLUON_DTYPE[dtype])


def descriptor(x_BTHX: Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    """TMA descriptor of (B, H, T, X), a block being num_rows of T and num_columns of X."""
    block = [1, 1, num_rows, num_columns]
    layout = _layout(num_rows, num_columns, x_BTHX.dtype)
    x = x_BTHX.transpose(1, 2)
    unit = (
        16 // x.element_size()
    )  # a dimension of extent 1 may carry any stride; TMA wants multiples of 16 bytes
    strides = [s if n > 1 else unit for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_start: Tensor | None,
    scale: float,
    *,
    causal: bool = True,
) -> None:
    """Fill out and lse."""
    num_batch, num_queries, num_heads, width = q.shape
    num_keys, v_width = v.shape[1], v.shape[-1]
    d1, d2 = v_width, width - v_width
    block_n, stages = _FORWARD_TILE
    grid = (triton.cdiv(num_queries, 128), num_heads, num_batch)
    hopper_forward_kernel[grid](
        descriptor(q, 64, d1), descriptor(q, 64, d2), descriptor(k, block_n, d1),
        descriptor(k, block_n, d2), descriptor(v, block_n, v_width), descriptor(out, 64, v_width),
        lse, lse if document_start is None else document_start,
        scale * LOG2_E, num_heads, num_queries, num_keys,
        BLOCK_N=block_n, STAGES=stages, D1=d1, D2=d2, DV=v_width,
        HAS_DOCUMENTS=document_start is not None, CAUSAL=causal, num_warps=4, maxnreg=168,
    )  # fmt: skip
