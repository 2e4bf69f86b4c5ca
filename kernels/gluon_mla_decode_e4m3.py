"""MLA decode of few heads over an e4m3 cache on Hopper, without widening the keys (Gluon).

Names and maths are those of `triton_mla_flash_decode`; this replaces `triton_mla_splits` where
it applies: at most 16 query rows, an e4m3 cache in pages of a multiple of 64 tokens (or
contiguous), capability 9.0. A tile is R + P wide where that is a power of two, else R wide and a
rope tile.

Why. Widening a tile in registers and writing it back to shared memory costs as much as reading it.
Here the codes go from the cache to shared memory once (TMA) and are read there twice, as codes.

Scores. S^T = C Q^T with the codes as wgmma's left operand, straight from shared memory. The queries
must then be e4m3 too: each is a sum of two, q = high + low, after a scale a row that is a power of
two. A bf16 query is that sum exactly (eight significant bits are four and four), unless it is
below 2^-9 of its row's largest over 448; an fp16 query is rounded to about eight bits. High and low
terms are 32 columns of one product, added afterwards. The tensor cores add e4m3 products with 14
bits, so the partial sum of every PRECISE columns is added in fp32.

Values. The same bytes are read as 16-bit pairs of neighbouring dimensions, transposed on the way
(ldmatrix.trans), and each half is widened to fp16: two operands of mma.sync, for even and odd
dimensions, whose results are interleaved in the end. mma.sync takes 16 rows where wgmma takes 64.

Rows of the last tile that lie past the sequence's end are set to zero in shared memory, because a
probability of 0 times a NaN that happens to be there would be NaN.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from ic.kernels.launch import Launch
from ic.kernels.mla_decode_launch import DecodeConfig

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
sync_threads = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
LN2 = gl.constexpr(0.6931471805599453)
BLOCK_N = gl.constexpr(64)
SHIFT = gl.constexpr(14.0)
PRECISE = 128
# Tokens whose values are read at once: more only takes registers.
CHUNK = gl.constexpr(16)


@gluon.jit
def _tile_row(
    table, start, end, first_row, num_pages, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr
):  # fmt: skip
    """Row of the flat cache where a tile starts; any valid one for a tile past the end."""
    if PAGED:
        page = gl.load(table + start // PAGE_SIZE, mask=start < end, other=0)
        return gl.minimum(gl.maximum(page, 0), num_pages - 1) * PAGE_SIZE + start % PAGE_SIZE
    else:
        return first_row + start


@gluon.jit
def _fetch(desc_tile, desc_rope, tile, rope, loaded, buffer, row,
           R: gl.constexpr, P: gl.constexpr, COMBINED: gl.constexpr):  # fmt: skip
    bar = loaded.index(buffer)
    mbarrier.expect(bar, BLOCK_N * (R + P))
    tma_load(desc_tile, [row, 0], bar, tile.index(buffer))
    if not COMBINED:
        tma_load(desc_rope, [row, R], bar, rope.index(buffer))


@gluon.jit
def _load_query(ptr, offsets, row_ok, FIRST: gl.constexpr, WIDTH: gl.constexpr,
                TILE: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """[16, TILE] in fp32: columns FIRST.. hold the WIDTH columns of the query, others zero."""
    col = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    ok = row_ok[:, None] & (col >= FIRST)[None, :] & (col < FIRST + WIDTH)[None, :]
    return gl.load(ptr + offsets[:, None] + (col - FIRST)[None, :], mask=ok, other=0.0).to(
        gl.float32
    )


@gluon.jit
def _store_terms(smem, q, to_codes):
    """Rows 0 to 15: the queries in e4m3; rows 16 to 31: what that leaves out, in e4m3."""
    q = q * to_codes[:, None]
    high = q.to(gl.float8e4nv)
    smem.slice(0, 16, dim=0).store(high)
    smem.slice(16, 16, dim=0).store((q - high.to(gl.float32)).to(gl.float8e4nv))


@gluon.jit
def _widen_pairs(pairs):
    """fp16 values of the low and of the high bytes, both e4m3, of two 16-bit pairs at a time."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 sorted;
        .reg .b16 low, high;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {low, high}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _as_pairs(tile, PAIRS: gl.constexpr, layout: gl.constexpr):
    """A tile of codes as 16-bit pairs of neighbouring dimensions."""
    if PUBLIC_REINTERPRET:
        return tile.reinterpret(gl.uint16, [BLOCK_N, PAIRS], layout)
    else:
        return tile._reinterpret(gl.uint16, [BLOCK_N, PAIRS], layout)


@gluon.jit
def _zero_rows(pairs, count):
    """Set rows `count`.. of a tile of pairs in shared memory to zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for first in gl.static_range(0, BLOCK_N, 16):
        part = pairs.slice(first, 16, dim=0)
        row = first + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
        part.store(gl.where((row < count)[:, None], part.load(layout), 0))


@gluon.jit
def _values(p_smem, pairs, acc_even, acc_odd, acc_layout: gl.constexpr):
    for first in gl.static_range(0, BLOCK_N, CHUNK):
        p = p_smem.slice(first, CHUNK, dim=0).permute((1, 0))
        p = p.load(gl.DotOperandLayout(0, acc_layout, 2))
        x = pairs.slice(first, CHUNK, dim=0).load(gl.DotOperandLayout(1, acc_layout, 2))
        even, odd = _widen_pairs(x)
        acc_even = mma_v2(p, even, acc_even)
        acc_odd = mma_v2(p, odd, acc_odd)
    return acc_even, acc_odd


@gluon.jit(do_not_specialize=["max_tokens", "num_pages", "num_splits"])
def _decode_e4m3_kernel(
    q_latent_ptr, q_rope_ptr, desc_tile, desc_rope, scale_ptr, block_table_ptr, seq_lens_ptr,
    out_ptr, lse_ptr,
    stride_qb, stride_qq, stride_qh, stride_rb, stride_rq, stride_rh, stride_table,
    num_heads, num_rows, max_tokens, num_pages, num_splits, scale_log2,
    NUM_QUERY: gl.constexpr, R: gl.constexpr, P: gl.constexpr, TILE: gl.constexpr,
    COMBINED: gl.constexpr, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, PRECISE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One split of one sequence for up to 16 query rows: four warps, STAGES tiles in flight."""
    if PDL:
        gdc_launch_dependents()
    split = gl.program_id(0) % num_splits
    batch = gl.program_id(0) // num_splits
    length = gl.minimum(gl.maximum(gl.load(seq_lens_ptr + batch), 0), max_tokens)
    tiles_per_split = gl.cdiv(gl.cdiv(length, BLOCK_N), num_splits)
    begin = split * tiles_per_split * BLOCK_N
    end = gl.maximum(gl.minimum(begin + tiles_per_split * BLOCK_N, length), begin)
    num_tiles = gl.cdiv(end - begin, BLOCK_N)

    codes: gl.constexpr = gl.float8e4nv
    tile = gl.allocate_shared_memory(codes, [STAGES, BLOCK_N, TILE], desc_tile.layout)
    q_tile = gl.allocate_shared_memory(codes, [32, TILE], desc_tile.layout)
    rope = tile
    q_rope = q_tile
    if not COMBINED:
        rope = gl.allocate_shared_memory(codes, [STAGES, BLOCK_N, P], desc_rope.layout)
        q_rope = gl.allocate_shared_memory(codes, [32, P], desc_rope.layout)
    p_smem = gl.allocate_shared_memory(
        gl.float16, [BLOCK_N, 16], gl.SwizzledSharedLayout(8, 4, 2, order=[1, 0])
    )
    factor_smem = gl.allocate_shared_memory(
        gl.float32, [16], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)

    table = block_table_ptr
    if PAGED:
        table += batch.to(gl.int64) * stride_table
    first_row = batch * max_tokens
    for stage in gl.static_range(STAGES):
        if stage < num_tiles:
            row = _tile_row(table, begin + stage * BLOCK_N, end, first_row, num_pages, PAGED,
                            PAGE_SIZE)  # fmt: skip
            _fetch(desc_tile, desc_rope, tile, rope, loaded, stage, row, R, P, COMBINED)

    blocked: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    terms_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 32])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 32])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    pair_layout: gl.constexpr = gl.NVMMASharedLayout(desc_tile.layout.swizzle_byte_width, 16, 2)
    head_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)

    rows = gl.arange(0, 16, layout=gl.SliceLayout(1, blocked))
    row_ok = rows < num_rows
    token = (rows // num_heads).to(gl.int64)
    head = (rows % num_heads).to(gl.int64)
    q_offsets = batch.to(gl.int64) * stride_qb + token * stride_qq + head * stride_qh
    r_offsets = batch.to(gl.int64) * stride_rb + token * stride_rq + head * stride_rh
    query = _load_query(q_latent_ptr, q_offsets, row_ok, 0, R, TILE, blocked)
    if COMBINED and P > 0:
        query += _load_query(q_rope_ptr, r_offsets, row_ok, R, P, TILE, blocked)
    largest = gl.max(gl.abs(query), 1)
    if not COMBINED:
        rope_query = _load_query(q_rope_ptr, r_offsets, row_ok, 0, P, P, blocked)
        largest = gl.maximum(largest, gl.max(gl.abs(rope_query), 1))
    # The power of two that takes the largest to 224..448, the upper half of e4m3's range.
    exponent = gl.floor(gl.log2(448.0 / gl.maximum(largest, 1e-30)))
    _store_terms(q_tile, query, gl.exp2(exponent))
    if not COMBINED:
        _store_terms(q_rope, rope_query, gl.exp2(exponent))
    head_factor = gl.convert_layout(gl.exp2(-exponent) * scale_log2, head_layout)
    fence_async_shared()
    sync_threads()

    offs = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    heads = gl.arange(0, 16, layout=head_layout)
    limit = gl.minimum(length - (NUM_QUERY - 1) + heads // num_heads, end)
    m = gl.full([16], -1e30, gl.float32, head_layout)
    total = gl.full([BLOCK_N, 16], 0.0, gl.float32, s_layout)
    acc_even = gl.zeros([16, TILE // 2], gl.float32, acc_layout)
    acc_odd = gl.zeros([16, TILE // 2], gl.float32, acc_layout)

    row = _tile_row(table, begin, end, first_row, num_pages, PAGED, PAGE_SIZE)
    token_scale = gl.load(scale_ptr + row.to(gl.int64) + offs, mask=offs < end - begin, other=1.0)
    row = _tile_row(table, begin + BLOCK_N, end, first_row, num_pages, PAGED, PAGE_SIZE)
    for i in range(num_tiles):
        start = begin + i * BLOCK_N
        buffer = i % STAGES
        # Scales travel one tile ahead and rows two, so that no iteration waits for them.
        next_scale = gl.load(scale_ptr + row.to(gl.int64) + offs,
                             mask=offs < end - start - BLOCK_N, other=1.0)  # fmt: skip
        row = _tile_row(table, start + 2 * BLOCK_N, end, first_row, num_pages, PAGED, PAGE_SIZE)
        fetch_row = _tile_row(table, start + STAGES * BLOCK_N, end, first_row, num_pages, PAGED,
                              PAGE_SIZE)  # fmt: skip
        mbarrier.wait(loaded.index(buffer), (i // STAGES) & 1)
        terms = gl.zeros([BLOCK_N, 32], gl.float32, terms_layout)
        # The rope first: what PRECISE columns of the tile give is added to it in fp32.
        if not COMBINED:
            terms = warpgroup_mma(rope.index(buffer), q_rope.permute((1, 0)), terms,
                                  use_acc=False, is_async=True)  # fmt: skip
        terms = warpgroup_mma(tile.index(buffer), q_tile.permute((1, 0)), terms,
                              use_acc=not COMBINED, max_num_imprecise_acc=PRECISE,
                              is_async=True)  # fmt: skip
        terms = warpgroup_mma_wait(0, deps=[terms])
        pairs = _as_pairs(tile.index(buffer), TILE // 2, pair_layout)
        if end - start < BLOCK_N:
            _zero_rows(pairs, end - start)
        s = gl.convert_layout(
            gl.sum(terms.reshape([BLOCK_N, 2, 16]), 1), s_layout, assert_trivial=True
        )
        token_scale = gl.maximum(token_scale, 1e-30)
        s = s * token_scale[:, None] * head_factor[None, :] + gl.log2(token_scale)[:, None]
        s = gl.where((start + offs)[:, None] < limit[None, :], s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 0))
        alpha = gl.exp2(m - m_new)
        p = gl.exp2(s - (m_new - SHIFT)[None, :])
        total = total * alpha[None, :] + p * (1.0 / token_scale)[:, None]
        m = m_new
        token_scale = next_scale
        factor_smem.store(alpha)
        p_smem.store(p.to(gl.float16))
        sync_threads()
        factor = factor_smem.load(acc_row_layout)[:, None]
        acc_even, acc_odd = _values(p_smem, pairs, acc_even * factor, acc_odd * factor, acc_layout)
        sync_threads()
        if i + STAGES < num_tiles:
            _fetch(desc_tile, desc_rope, tile, rope, loaded, buffer, fetch_row, R, P, COMBINED)

    mass = gl.sum(total, 0)
    empty = mass == 0.0
    mass = gl.where(empty, 1.0, mass)
    lse = gl.where(empty, float("-inf"), m - SHIFT + gl.log2(mass))
    if not SPLIT:
        lse = lse * LN2
    out_row = batch.to(gl.int64) * num_rows
    if SPLIT:
        out_row = (batch.to(gl.int64) * num_splits + split) * num_rows
    gl.store(lse_ptr + out_row + heads, lse, mask=heads < num_rows)
    factor = gl.convert_layout(1.0 / mass, acc_row_layout)[:, None]
    out = gl.join(acc_even * factor, acc_odd * factor).reshape([16, TILE])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, out.type.layout))
    col = gl.arange(0, TILE, layout=gl.SliceLayout(0, out.type.layout))
    gl.store(out_ptr + (out_row + row)[:, None] * R + col[None, :],
             out.to(out_ptr.dtype.element_ty),
             mask=(row < num_rows)[:, None] & (col < R)[None, :])  # fmt: skip


class E4M3Splits:
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
        P = q_rope_BQHP.shape[3]
        tile = R + P if config.combined else R
        self.batch, self.width = B, R + P
        self.widths = (tile,) if config.combined else (tile, P)
        self.layouts = [
            gl.NVMMASharedLayout.get_default_for([64, width], gl.float8e4nv)
            for width in self.widths
        ]
        paged = block_table is not None
        self.numbers = (
            *q_latent_BQHR.stride()[:3], *q_rope_BQHP.stride()[:3],
            block_table.stride(0) if block_table is not None else 0, H, Q * H,
        )  # fmt: skip
        self.launches = tuple(
            Launch(
                _decode_e4m3_kernel,
                {
                    "NUM_QUERY": Q, "R": R, "P": P, "TILE": tile, "COMBINED": config.combined,
                    "PAGED": paged, "PAGE_SIZE": cache.shape[1] if paged else 64,
                    "STAGES": config.num_stages, "SPLIT": is_split, "PRECISE": min(PRECISE, tile),
                    "PDL": config.pdl and is_split,
                },
                num_warps=config.num_warps,
            )
            for is_split in (False, True)
        )  # fmt: skip

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
        assert cache_scale is not None
        flat = cache.view(-1, self.width)
        descriptors = [
            TensorDescriptor.from_tensor(flat, [64, width], layout)
            for width, layout in zip(self.widths, self.layouts, strict=True)
        ]
        table = seq_lens_B if block_table is None else block_table
        max_tokens = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        self.launches[num_splits > 1](
            (self.batch * num_splits, 1, 1),
            (
                q_latent_BQHR, q_rope_BQHP, descriptors[0], descriptors[-1],
                cache_scale.contiguous(), table, seq_lens_B, out, lse,
            ),
            (*self.numbers, max_tokens, cache.shape[0], num_splits, scale_log2),
        )  # fmt: skip
