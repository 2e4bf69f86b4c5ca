"""MLA decode for many heads and a latent of 256 or less on Hopper (Gluon).

Names and maths are those of `triton_mla_flash_decode`; this replaces `triton_mla_splits` where it
applies: more than 16 query rows, latent 128, 192 or 256 and rope 64, a bf16 or fp16 cache in pages
of a multiple of 64 tokens (or contiguous), capability 9.0.

Why. A value row of 256 columns fits into the registers of one warpgroup, so unlike in
`gluon_mla_decode` a warpgroup keeps scores, softmax and values of its 64 query rows to itself and
its probabilities never leave the registers. Two of them share every tile of a program of 128 rows:
the matrix units work for the one while the other computes its softmax. Within a warpgroup the
scores of a tile and the values of the tile before it are issued together. ptxas waits for both
before the softmax; to hold it under the values was slower (docs/kernels.md). One more warp fetches
tiles (TMA) as far ahead as buffers go: 5 of 32 KiB at 192+64, which is what hides the latency of
the memory. Up to 64 rows there is one warpgroup, whose rows that no query has are zero, and
memory is the bound.

A tile is fetched in up to three parts: the first 128 (of 256: all) latent columns, the 64 others of
192, the 64 rope columns. So values take the columns of the latent only, where one tile of 256
columns would make a quarter of the products for nothing.

Tiles are walked from the last to the first: only the first one met can be partial, and with one
query token only that one needs a mask.

Barriers. `loaded[STAGES]`: TMA has filled a buffer. `freed[STAGES]`: each warpgroup is done with
it. `zeroed`: rows of the last tile that lie past the sequence's end are zero (a probability of 0
times a NaN that happens to be there would be NaN); the first warpgroup sees to it.

Source: Shah et al., "FlashAttention-3", arXiv 2407.08608.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ic.kernels.gluon_mla_decode import LN2, _load_rows, _zero_rows, sync_threads, tma_load
from ic.kernels.launch import Launch
from ic.kernels.mla_decode_launch import DecodeConfig

ROPE = gl.constexpr(64)
# Registers of a thread: of all on average, of a consumer (the first has what is left), of the
# producer. By the number of warpgroups that consume.
REGISTERS = {1: (168, 240, 96), 2: (168, 240, 24)}


@gluon.jit
def _page(table, start, begin, num_pages, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The page of the tile at `start`; any valid one for a tile before `begin`."""
    page = start * 0
    if PAGED:
        page = gl.load(table + start // PAGE_SIZE, mask=start >= begin, other=0)
        page = gl.minimum(gl.maximum(page, 0), num_pages - 1)
    return page


@gluon.jit
def _produce(
    tiles, source, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    first, second, rope, loaded, freed = tiles
    desc_first, desc_narrow, table, first_row, num_pages, begin, end, num_tiles = source
    start = begin + (num_tiles - 1) * 64
    # A sequence of no tokens may have no pages either.
    page = _page(table, start, gl.where(end > begin, begin, start + 1), num_pages, PAGED, PAGE_SIZE)
    for i in range(num_tiles):
        stage = i % STAGES
        row = first_row + start
        if PAGED:
            row = page * PAGE_SIZE + start % PAGE_SIZE
        # Page numbers travel one tile ahead.
        start -= 64
        page = _page(table, start, begin, num_pages, PAGED, PAGE_SIZE)
        mbarrier.wait(freed.index(stage), ((i // STAGES) & 1) ^ 1)
        bar = loaded.index(stage)
        mbarrier.expect(bar, 64 * (FIRST + SECOND + ROPE) * 2)
        tma_load(desc_first, [row, 0], bar, first.index(stage))
        if SECOND > 0:
            tma_load(desc_narrow, [row, FIRST], bar, second.index(stage))
        tma_load(desc_narrow, [row, FIRST + SECOND], bar, rope.index(stage))


@gluon.jit
def _scores(q_first, q_second, q_rope, first, second, rope, LAYOUT: gl.constexpr,
            SECOND: gl.constexpr):  # fmt: skip
    s = gl.zeros([64, 64], gl.float32, LAYOUT)
    s = warpgroup_mma(q_first, first.permute((1, 0)), s, use_acc=False, is_async=True)
    if SECOND > 0:
        s = warpgroup_mma(q_second, second.permute((1, 0)), s, is_async=True)
    return warpgroup_mma(q_rope, rope.permute((1, 0)), s, is_async=True)


@gluon.jit
def _store(acc, out_ptr, offsets, row_ok, FIRST_COLUMN: gl.constexpr, LAYOUT: gl.constexpr):
    cols = FIRST_COLUMN + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    pointers = out_ptr + offsets[:, None] + cols[None, :]
    gl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])


@gluon.jit
def _consume(
    tiles, work, queries, GROUP: gl.constexpr, GROUPS: gl.constexpr, NUM_QUERY: gl.constexpr,
    SHIFT: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr,
    SECOND: gl.constexpr,
):  # fmt: skip
    """Attention of 64 query rows; group GROUP of the GROUPS that share the tiles."""
    first, second, rope, loaded, freed = tiles
    (zeroed, begin, end, num_tiles, length, num_rows, num_heads, scale_log2, q_latent_ptr,
     q_rope_ptr, out_ptr, lse_ptr, q_row, r_row, stride_qq, stride_qh, stride_rq, stride_rh,
     out_row) = work  # fmt: skip
    q_first, q_second, q_rope, row_start = queries
    DTYPE: gl.constexpr = q_first.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    # The layout of 64 value columns is that of the scores.
    SECOND_P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)

    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    load_rows = row_start + gl.arange(0, 64, layout=gl.SliceLayout(1, blocked))
    load_ok = load_rows < num_rows
    token = (load_rows // num_heads).to(gl.int64)
    head = (load_rows % num_heads).to(gl.int64)
    q_offsets = q_row + token * stride_qq + head * stride_qh
    _load_rows(q_latent_ptr, q_offsets, load_ok, 0, q_first, FIRST)
    if SECOND > 0:
        _load_rows(q_latent_ptr, q_offsets, load_ok, FIRST, q_second, SECOND)
    r_offsets = r_row + token * stride_rq + head * stride_rh
    _load_rows(q_rope_ptr, r_offsets, load_ok, 0, q_rope, ROPE)
    fence_async_shared()
    sync_threads()

    offs = gl.arange(0, 64, layout=gl.SliceLayout(0, S_LAYOUT))
    rows = row_start + gl.arange(0, 64, layout=S_ROW)
    limit = gl.minimum(length - (NUM_QUERY - 1) + rows // num_heads, end)
    start = begin + (num_tiles - 1) * 64
    mbarrier.wait(loaded.index(0), 0)
    if end - start < 64:
        if GROUP == 0:
            _zero_rows(first.index(0), end - start, FIRST)
            if SECOND > 0:
                _zero_rows(second.index(0), end - start, SECOND)
            fence_async_shared()
            sync_threads()
            if GROUPS > 1:
                mbarrier.arrive(zeroed)
        else:
            mbarrier.wait(zeroed, 0)
    token_s = _scores(
        q_first, q_second, q_rope, first.index(0), second.index(0), rope.index(0), S_LAYOUT, SECOND
    )
    s = warpgroup_mma_wait(0, deps=[token_s]) * scale_log2
    s = gl.where((start + offs)[None, :] < limit[:, None], s, float("-inf"))
    m = gl.maximum(gl.max(s, 1), -1e30)  # a row may see no token of this tile
    p32 = gl.exp2(s - (m - SHIFT)[:, None])
    total = gl.sum(p32, 1)
    p = gl.convert_layout(p32.to(DTYPE), P_LAYOUT)
    acc = gl.zeros([64, FIRST], gl.float32, LAYOUT)
    if SECOND > 0:
        acc_second = gl.zeros([64, SECOND], gl.float32, S_LAYOUT)

    for i in range(1, num_tiles):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(loaded.index(stage), (i // STAGES) & 1)
        token_s = _scores(
            q_first, q_second, q_rope, first.index(stage), second.index(stage), rope.index(stage),
            S_LAYOUT, SECOND,
        )  # fmt: skip
        token_acc = warpgroup_mma(p, first.index(before), acc, is_async=True)
        if SECOND > 0:
            token_second = warpgroup_mma(
                gl.convert_layout(p, SECOND_P_LAYOUT), second.index(before), acc_second,
                is_async=True,
            )  # fmt: skip
        s = warpgroup_mma_wait(2 if SECOND > 0 else 1, deps=[token_s]) * scale_log2
        start -= 64
        if NUM_QUERY > 1:
            s = gl.where((start + offs)[None, :] < limit[:, None], s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))
        alpha = gl.exp2(m - m_new)
        p32 = gl.exp2(s - (m_new - SHIFT)[:, None])
        total = total * alpha + gl.sum(p32, 1)
        m = m_new
        if SECOND > 0:
            acc, acc_second = warpgroup_mma_wait(0, deps=[token_acc, token_second])
            acc_second = acc_second * alpha[:, None]
        else:
            acc = warpgroup_mma_wait(0, deps=[token_acc])
        mbarrier.arrive(freed.index(before))
        acc = acc * gl.convert_layout(alpha, ROW)[:, None]
        p = gl.convert_layout(p32.to(DTYPE), P_LAYOUT)

    before = (num_tiles - 1) % STAGES
    acc = warpgroup_mma(p, first.index(before), acc, is_async=True)
    if SECOND > 0:
        acc_second = warpgroup_mma(
            gl.convert_layout(p, SECOND_P_LAYOUT), second.index(before), acc_second, is_async=True
        )
        acc, acc_second = warpgroup_mma_wait(0, deps=[acc, acc_second])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])

    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), m - SHIFT + gl.log2(total))
    if not SPLIT:
        lse = lse * LN2
    row_ok = rows < num_rows
    gl.store(lse_ptr + out_row + rows, lse, mask=row_ok)
    factor = 1.0 / total
    offsets = (out_row + rows) * (FIRST + SECOND)
    if SECOND > 0:
        _store(acc_second * factor[:, None], out_ptr, offsets, row_ok, FIRST, S_LAYOUT)
    acc = acc * gl.convert_layout(factor, ROW)[:, None]
    wide_rows = row_start + gl.arange(0, 64, layout=ROW)
    offsets = (out_row + wide_rows) * (FIRST + SECOND)
    _store(acc, out_ptr, offsets, wide_rows < num_rows, 0, LAYOUT)


@gluon.jit(do_not_specialize=["max_tokens", "num_pages", "num_splits"])
def _decode_pairs_kernel(
    q_latent_ptr, q_rope_ptr, desc_first, desc_narrow, block_table_ptr, seq_lens_ptr, out_ptr,
    lse_ptr, stride_qb, stride_qq, stride_qh, stride_rb, stride_rq, stride_rh, stride_table,
    num_heads, num_rows, max_tokens, num_pages, num_splits, num_row_blocks, scale_log2,
    NUM_QUERY: gl.constexpr, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr, SHIFT: gl.constexpr,
    SPLIT: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr,
    SECOND: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    row_block = pid % num_row_blocks
    split = (pid // num_row_blocks) % num_splits
    batch = pid // num_row_blocks // num_splits
    length = gl.minimum(gl.maximum(gl.load(seq_lens_ptr + batch), 0), max_tokens)
    tiles_per_split = gl.cdiv(gl.cdiv(length, 64), num_splits)
    begin = split * tiles_per_split * 64
    # A split of no tokens takes one tile all the same, all of whose rows are zeroed and masked.
    begin = gl.where(begin < length, begin, 0)
    end = gl.minimum(begin + tiles_per_split * 64, length)
    end = gl.where(split * tiles_per_split * 64 < length, end, begin)
    num_tiles = gl.maximum(gl.cdiv(end - begin, 64), 1)

    dtype: gl.constexpr = q_latent_ptr.dtype.element_ty
    wide: gl.constexpr = desc_first.layout
    narrow: gl.constexpr = desc_narrow.layout
    q_first = gl.allocate_shared_memory(dtype, [GROUPS, 64, FIRST], wide)
    q_rope = gl.allocate_shared_memory(dtype, [GROUPS, 64, ROPE], narrow)
    first = gl.allocate_shared_memory(dtype, [STAGES, 64, FIRST], wide)
    rope = gl.allocate_shared_memory(dtype, [STAGES, 64, ROPE], narrow)
    q_second = q_rope
    second = rope
    if SECOND > 0:
        q_second = gl.allocate_shared_memory(dtype, [GROUPS, 64, SECOND], narrow)
        second = gl.allocate_shared_memory(dtype, [STAGES, 64, SECOND], narrow)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    zeroed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=GROUPS)
    mbarrier.init(zeroed, count=1)
    fence_async_shared()
    sync_threads()

    table = block_table_ptr
    if PAGED:
        table = block_table_ptr + batch.to(gl.int64) * stride_table
    out_row = batch.to(gl.int64) * num_rows
    if SPLIT:
        out_row = (batch.to(gl.int64) * num_splits + split) * num_rows
    first_row = batch * max_tokens
    q_row = batch.to(gl.int64) * stride_qb
    r_row = batch.to(gl.int64) * stride_rb
    row_start = row_block * (64 * GROUPS)
    tiles = (first, second, rope, loaded, freed)
    work = (zeroed, begin, end, num_tiles, length, num_rows, num_heads, scale_log2, q_latent_ptr,
            q_rope_ptr, out_ptr, lse_ptr, q_row, r_row, stride_qq, stride_qh, stride_rq, stride_rh,
            out_row)  # fmt: skip
    upper = (q_first.index(0), q_second.index(0), q_rope.index(0), row_start)
    source = (desc_first, desc_narrow, table, first_row, num_pages, begin, end, num_tiles)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (tiles, work, upper, 0, GROUPS, NUM_QUERY, SHIFT, SPLIT, STAGES, FIRST,
                            SECOND)),
                (_produce, (tiles, source, PAGED, PAGE_SIZE, STAGES, FIRST, SECOND)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        lower = (q_first.index(1), q_second.index(1), q_rope.index(1), row_start + 64)
        gl.warp_specialize(
            [
                (_consume, (tiles, work, upper, 0, GROUPS, NUM_QUERY, SHIFT, SPLIT, STAGES, FIRST,
                            SECOND)),
                (_consume, (tiles, work, lower, 1, GROUPS, NUM_QUERY, SHIFT, SPLIT, STAGES, FIRST,
                            SECOND)),
                (_produce, (tiles, source, PAGED, PAGE_SIZE, STAGES, FIRST, SECOND)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


class PairsSplits:
    """The kernel for one kind of input; arguments as in `mla_decode_plan.Splits`."""

    def __init__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor | None,
        config: DecodeConfig,
    ) -> None:
        B, Q, H, R = q_latent_BQHR.shape
        element = gl.bfloat16 if cache.dtype == torch.bfloat16 else gl.float16
        first, second = column_parts(R)
        self.first, self.width = first, R + 64
        self.wide = gl.NVMMASharedLayout.get_default_for([64, first], element)
        self.narrow = gl.NVMMASharedLayout.get_default_for([64, 64], element)
        paged = block_table is not None
        self.row_blocks = triton.cdiv(Q * H, config.block_m)
        self.groups = B * self.row_blocks
        self.numbers = (
            *q_latent_BQHR.stride()[:3], *q_rope_BQHP.stride()[:3],
            block_table.stride(0) if block_table is not None else 0, H, Q * H,
        )  # fmt: skip
        average, consumer, producer = REGISTERS[config.block_m // 64]
        self.launches = tuple(
            Launch(
                _decode_pairs_kernel,
                {
                    "NUM_QUERY": Q,
                    "PAGED": paged,
                    "PAGE_SIZE": cache.shape[1] if paged else 64,
                    "SHIFT": 14.0 if cache.dtype == torch.float16 else 0.0,
                    "SPLIT": is_split,
                    "GROUPS": config.block_m // 64,
                    "STAGES": config.num_stages,
                    "FIRST": first,
                    "SECOND": second,
                    "CONSUMER_REGISTERS": consumer,
                    "PRODUCER_REGISTERS": producer,
                },
                num_warps=4,
                maxnreg=average,
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
        flat = cache.view(-1, self.width)
        first = TensorDescriptor.from_tensor(flat, [64, self.first], self.wide)
        narrow = TensorDescriptor.from_tensor(flat, [64, 64], self.narrow)
        table = seq_lens_B if block_table is None else block_table
        max_tokens = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        self.launches[num_splits > 1](
            (self.groups * num_splits, 1, 1),
            (q_latent_BQHR, q_rope_BQHP, first, narrow, table, seq_lens_B, out, lse),
            (*self.numbers, max_tokens, cache.shape[0], num_splits, self.row_blocks, scale_log2),
        )  # fmt: skip


def column_parts(latent_dim: int) -> tuple[int, int]:
    """Latent columns of the two parts in which a tile is fetched; the second may be 0."""
    return (128, 64) if latent_dim == 192 else (latent_dim, 0)
