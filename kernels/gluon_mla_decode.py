"""MLA decode for many heads on Hopper: three warpgroups, one for scores and two for values (Gluon).

Names and maths are those of `triton_mla_flash_decode`; this replaces `triton_mla_splits` where
it applies: more than 16 query rows, latent 512 or 448 and rope 64, a bf16 or fp16 cache in pages of
a multiple of 64 tokens (or contiguous), capability 9.0. `gluon_mla_decode_pairs` takes smaller
latents. Rows of a block of 64 that no query has are zero.

Why. With 64 rows and more decode is bound by the matrix units, not by memory. In the Triton kernel
all eight warps compute scores, then softmax, then values: the matrix units idle during the softmax.
Here one warpgroup fetches tiles (TMA), computes the 64 x 64 scores and the softmax and puts the
probabilities into shared memory; two warpgroups each accumulate half of the 512 value columns. So
the values of tile i are multiplied while the scores of tile i + 1 are. A tile's buffer is refilled
as soon as its values are done: two buffers of 72 KiB, queries 72 KiB, probabilities 8 KiB of shared
memory. A row of 448 + 64 is two halves of 256: its rope columns are the last of the right half, and
what is accumulated for them is dropped.

Barriers. `loaded[2]`: TMA has filled a buffer. `scored`: probabilities and the factor for the
accumulator are in shared memory (one arrival). `valued[2]`: both value warpgroups are done with
them and with the tile's buffer (two arrivals). The last use of `scored` hands over 1 / sum.

Rows of the last tile that lie past the sequence's end are set to zero in shared memory, because a
probability of 0 times a NaN that happens to be there would be NaN.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
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

from ic.kernels.launch import Launch

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
sync_threads = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _fetch(
    desc_half, desc_rope, left, right, rope, loaded, buffer, start, table, first_row, num_pages,
    PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    if PAGED:
        page = gl.load(table + start // PAGE_SIZE)
        page = gl.minimum(gl.maximum(page, 0), num_pages - 1)
        row = page * PAGE_SIZE + start % PAGE_SIZE
    else:
        row = first_row + start
    bar = loaded.index(buffer)
    mbarrier.expect(bar, 64 * (R + 64) * 2)
    tma_load(desc_half, [row, 0], bar, left.index(buffer))
    tma_load(desc_half, [row, 256], bar, right.index(buffer))
    if R == 512:
        tma_load(desc_rope, [row, 512], bar, rope.index(buffer))


@gluon.jit
def _zero_rows(tile, count, WIDTH: gl.constexpr):
    """Set rows `count`.. of a tile of 64 rows in shared memory to zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    for chunk in gl.static_range(WIDTH // 64):
        part = tile.slice(chunk * 64, 64, dim=1)
        value = part.load(layout)
        part.store(gl.where((row < count)[:, None], value, 0.0))


@gluon.jit
def _scores(
    q_left, q_right, q_rope, left, right, rope, p_smem, factor_smem, loaded, scored, valued,
    desc_half, desc_rope, table, first_row, num_pages, begin, end, length, row_start, num_rows,
    num_heads, scale_log2, lse_ptr, lse_row, NUM_QUERY: gl.constexpr, PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SHIFT: gl.constexpr, SPLIT: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    offs = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    rows = row_start + gl.arange(0, 64, layout=row_layout)
    limit = gl.minimum(length - (NUM_QUERY - 1) + rows // num_heads, end)
    m = gl.full([64], -1e30, gl.float32, row_layout)
    total = gl.full([64], 0.0, gl.float32, row_layout)
    num_tiles = gl.cdiv(end - begin, 64)
    if num_tiles > 0:
        _fetch(desc_half, desc_rope, left, right, rope, loaded, 0, begin, table, first_row,
               num_pages, PAGED, PAGE_SIZE, R)  # fmt: skip
    if num_tiles > 1:
        _fetch(desc_half, desc_rope, left, right, rope, loaded, 1, begin + 64, table, first_row,
               num_pages, PAGED, PAGE_SIZE, R)  # fmt: skip
    for i in range(num_tiles):
        start = begin + i * 64
        buffer = i % 2
        mbarrier.wait(loaded.index(buffer), (i // 2) & 1)
        s = gl.zeros([64, 64], gl.float32, layout)
        s = warpgroup_mma(
            q_left, left.index(buffer).permute((1, 0)), s, use_acc=False, is_async=True
        )
        s = warpgroup_mma(q_right, right.index(buffer).permute((1, 0)), s, is_async=True)
        if R == 512:
            s = warpgroup_mma(q_rope, rope.index(buffer).permute((1, 0)), s, is_async=True)
        if i > 0:
            mbarrier.wait(valued.index(1 - buffer), ((i - 1) // 2) & 1)
            if i + 1 < num_tiles:
                _fetch(desc_half, desc_rope, left, right, rope, loaded, 1 - buffer, start + 64,
                       table, first_row, num_pages, PAGED, PAGE_SIZE, R)  # fmt: skip
        s = warpgroup_mma_wait(0, deps=[s])
        if end - start < 64:
            _zero_rows(left.index(buffer), end - start, 256)
            _zero_rows(right.index(buffer), end - start, 256)
        s = s * scale_log2
        s = gl.where((start + offs)[None, :] < limit[:, None], s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))
        alpha = gl.exp2(m - m_new)
        p = gl.exp2(s - (m_new - SHIFT)[:, None])
        total = total * alpha + gl.sum(p, 1)
        m = m_new
        factor_smem.store(alpha)
        p_smem.store(p.to(p_smem.dtype))
        fence_async_shared()
        sync_threads()
        mbarrier.arrive(scored)
    if num_tiles > 0:
        mbarrier.wait(valued.index((num_tiles - 1) % 2), ((num_tiles - 1) // 2) & 1)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    factor_smem.store(1.0 / total)
    sync_threads()
    mbarrier.arrive(scored)
    lse = gl.where(empty, float("-inf"), m - SHIFT + gl.log2(total))
    if not SPLIT:
        lse = lse * LN2
    gl.store(lse_ptr + lse_row + rows, lse, mask=rows < num_rows)


@gluon.jit
def _values(
    half, p_smem, factor_smem, scored, valued, begin, end, row_start, num_rows, out_ptr, out_row,
    SIDE: gl.constexpr, COLUMNS: gl.constexpr, R: gl.constexpr = 512,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    acc = gl.zeros([64, 256], gl.float32, layout)
    num_tiles = gl.cdiv(end - begin, 64)
    for i in range(num_tiles):
        mbarrier.wait(scored, i & 1)
        acc = acc * factor_smem.load(row_layout)[:, None]
        acc = warpgroup_mma(p_smem, half.index(i % 2), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        sync_threads()
        mbarrier.arrive(valued.index(i % 2))
    mbarrier.wait(scored, num_tiles & 1)
    acc = acc * factor_smem.load(row_layout)[:, None]
    rows = row_start + gl.arange(0, 64, layout=row_layout)
    cols = SIDE * 256 + gl.arange(0, 256, layout=gl.SliceLayout(0, layout))
    offsets = (out_row + rows)[:, None] * R + cols[None, :]
    ok = (rows < num_rows)[:, None] & (cols < R)[None, :]
    gl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=ok)


@gluon.jit
def _load_rows(ptr, offsets, row_ok, first, smem, WIDTH: gl.constexpr):
    """Copy query columns first.. into shared memory, 64 at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    for chunk in gl.static_range(WIDTH // 64):
        pointers = ptr + offsets[:, None] + (first + chunk * 64 + col)[None, :]
        smem.slice(chunk * 64, 64, dim=1).store(gl.load(pointers, mask=row_ok[:, None], other=0.0))


@gluon.jit(do_not_specialize=["max_tokens", "num_pages", "num_splits"])
def _decode_many_heads_kernel(
    q_latent_ptr, q_rope_ptr, desc_half, desc_rope, block_table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qq, stride_qh, stride_rb, stride_rq, stride_rh, stride_table,
    num_heads, num_rows, max_tokens, num_pages, num_splits, num_row_blocks, scale_log2,
    NUM_QUERY: gl.constexpr, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr, SHIFT: gl.constexpr,
    SPLIT: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    row_block = pid % num_row_blocks
    split = (pid // num_row_blocks) % num_splits
    batch = pid // num_row_blocks // num_splits
    length = gl.minimum(gl.maximum(gl.load(seq_lens_ptr + batch), 0), max_tokens)
    tiles_per_split = gl.cdiv(gl.cdiv(length, 64), num_splits)
    begin = split * tiles_per_split * 64
    end = gl.maximum(gl.minimum(begin + tiles_per_split * 64, length), begin)

    dtype: gl.constexpr = q_latent_ptr.dtype.element_ty
    wide: gl.constexpr = desc_half.layout
    narrow: gl.constexpr = desc_rope.layout
    q_left = gl.allocate_shared_memory(dtype, [64, 256], wide)
    q_right = gl.allocate_shared_memory(dtype, [64, 256], wide)
    left = gl.allocate_shared_memory(dtype, [2, 64, 256], wide)
    right = gl.allocate_shared_memory(dtype, [2, 64, 256], wide)
    q_rope = q_right.slice(192, 64, dim=1)
    rope = right
    if R == 512:
        q_rope = gl.allocate_shared_memory(dtype, [64, 64], narrow)
        rope = gl.allocate_shared_memory(dtype, [2, 64, 64], narrow)
    p_smem = gl.allocate_shared_memory(dtype, [64, 64], narrow)
    factor_smem = gl.allocate_shared_memory(
        gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    valued = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded.index(0), count=1)
    mbarrier.init(loaded.index(1), count=1)
    mbarrier.init(scored, count=1)
    mbarrier.init(valued.index(0), count=2)
    mbarrier.init(valued.index(1), count=2)

    row_start = row_block * 64
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = row_start + gl.arange(0, 64, layout=gl.SliceLayout(1, blocked))
    row_ok = rows < num_rows
    token = (rows // num_heads).to(gl.int64)
    head = (rows % num_heads).to(gl.int64)
    q_offsets = batch.to(gl.int64) * stride_qb + token * stride_qq + head * stride_qh
    r_offsets = batch.to(gl.int64) * stride_rb + token * stride_rq + head * stride_rh
    _load_rows(q_latent_ptr, q_offsets, row_ok, 0, q_left, 256)
    _load_rows(q_latent_ptr, q_offsets, row_ok, 256, q_right, R - 256)
    _load_rows(q_rope_ptr, r_offsets, row_ok, 0, q_rope, 64)
    fence_async_shared()
    sync_threads()

    table = block_table_ptr
    if PAGED:
        table = block_table_ptr + batch.to(gl.int64) * stride_table
    out_row = batch.to(gl.int64) * num_rows
    if SPLIT:
        out_row = (batch.to(gl.int64) * num_splits + split) * num_rows
    first_row = batch * max_tokens
    gl.warp_specialize(
        [
            (_scores, (q_left, q_right, q_rope, left, right, rope, p_smem, factor_smem, loaded,
                       scored, valued, desc_half, desc_rope, table, first_row, num_pages, begin,
                       end, length, row_start, num_rows, num_heads, scale_log2, lse_ptr, out_row,
                       NUM_QUERY, PAGED, PAGE_SIZE, SHIFT, SPLIT, R)),
            (_values, (left, p_smem, factor_smem, scored, valued, begin, end, row_start, num_rows,
                       out_ptr, out_row, 0, 256, R)),
            (_values, (right, p_smem, factor_smem, scored, valued, begin, end, row_start, num_rows,
                       out_ptr, out_row, 1, 256, R)),
        ],
        [4, 4],
        [184, 184],
    )  # fmt: skip


class ManyHeadsSplits:
    """The kernel for one kind of input; arguments as in `mla_decode_plan.Splits`."""

    def __init__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor | None,
    ) -> None:
        B, Q, H, R = q_latent_BQHR.shape
        element = gl.bfloat16 if cache.dtype == torch.bfloat16 else gl.float16
        self.wide = gl.NVMMASharedLayout.get_default_for([64, 256], element)
        self.narrow = gl.NVMMASharedLayout.get_default_for([64, 64], element)
        self.paged = block_table is not None
        self.row_blocks = triton.cdiv(Q * H, 64)
        self.groups = B * self.row_blocks
        self.numbers = (
            *q_latent_BQHR.stride()[:3], *q_rope_BQHP.stride()[:3],
            block_table.stride(0) if block_table is not None else 0, H, Q * H,
        )  # fmt: skip
        self.launches = tuple(
            Launch(
                _decode_many_heads_kernel,
                {
                    "NUM_QUERY": Q,
                    "PAGED": self.paged,
                    "PAGE_SIZE": cache.shape[1] if self.paged else 64,
                    "SHIFT": 14.0 if cache.dtype == torch.float16 else 0.0,
                    "SPLIT": is_split,
                    "R": R,
                },
                num_warps=4,
            )
            for is_split in (False, True)
        )

    def __call__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        seq_lens_B: torch.Tensor,
        block_table: torch.Tensor | None,
        cache_scale: torch.Tensor | None,
        scale_log2: float,
        num_splits: int,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        flat = cache.view(-1, cache.shape[2])
        half = TensorDescriptor.from_tensor(flat, [64, 256], self.wide)
        rope = TensorDescriptor.from_tensor(flat, [64, 64], self.narrow)
        table = seq_lens_B if block_table is None else block_table
        max_tokens = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        self.launches[num_splits > 1](
            (self.groups * num_splits, 1, 1),
            (q_latent_BQHR, q_rope_BQHP, half, rope, table, seq_lens_B, out, lse),
            (*self.numbers, max_tokens, cache.shape[0], num_splits, self.row_blocks, scale_log2),
        )  # fmt: skip
