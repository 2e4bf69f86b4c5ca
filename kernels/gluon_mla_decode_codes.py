"""MLA decode of many heads over an e4m3 or int8 cache on Hopper: four warpgroups (Gluon).

Names and maths are those of `triton_mla_flash_decode`; this replaces `triton_mla_splits` where
it applies: more than 16 query rows, latent 512 and rope 64, a quantised cache in pages of a
multiple of 64 tokens (or contiguous), capability 9.0.

Why. The matrix units multiply fp16, so a tile of codes must be widened on its way to shared memory.
In the Triton kernel the warps that multiply also widen, one after the other, and its tile of 16
query rows widens the cache once for every 16 rows. Here, as in `gluon_mla_decode`, one warpgroup
computes scores and softmax and two the values; a fourth does nothing but load codes, widen them and
store them, while the tiles before are multiplied.

Codes are widened to fp16, which is exact, and stay without their token's scale: s = (q . code) *
scale, and the probability that meets a value's code is p * scale. Its largest must not exceed
fp16, so the scale goes into the exponent, 2^(s - m + log2 scale), m being the maximum of the sum;
the softmax's denominator is the sum of that over scale.

Barriers. `loaded[2]`: a tile is widened in a buffer, with its scale factors beside it (one
arrival). `scored` and `valued[2]` are those of `gluon_mla_decode`: a buffer is written again when
`valued` says that its values are done.

Rows past the sequence's end are not read: their codes are 0 and their scale 1.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

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

from ic.kernels.gluon_mla_decode import LN2, _values, sync_threads
from ic.kernels.gluon_widen import widen
from ic.kernels.launch import Launch

PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
# Words of four codes in a token.
WORDS = gl.constexpr(144)
SHIFT = gl.constexpr(14.0)
# A tile is widened in parts of so many latent columns, and the rope, and the codes of DEPTH parts
# are on their way to registers meanwhile.
COLUMNS = 64
DEPTH = 6
# Of a thread; what the two value warpgroups and the widening one leave of 512 is the scores'.
VALUE_REGISTERS = 160
WIDEN_REGISTERS = 96


@gluon.jit
def _as_parts(tile, COUNT: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile in shared memory as COUNT tiles of COLUMNS, the order of its layout, in words."""
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    if PUBLIC_REINTERPRET:
        return tile.reinterpret(gl.int32, [COUNT, 64, COLUMNS // 2], words)
    else:
        return tile._reinterpret(gl.int32, [COUNT, 64, COLUMNS // 2], words)


@gluon.jit
def _load_part(tile, part: gl.constexpr, count, COLUMNS: gl.constexpr):
    """Codes of one part of `count` tokens' columns, four in a word; zero for the other tokens."""
    # Eight neighbours store 16 bytes each to all 32 banks: four quarters of two rows.
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    WIDTH: gl.constexpr = COLUMNS // 4 if part < 512 // COLUMNS else 16
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    words = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    pointers = tile + part * (COLUMNS // 4) + rows[:, None] * WORDS + words[None, :]
    return gl.load(pointers, mask=(rows < count)[:, None], other=0)


@gluon.jit
def _prefetch_tile(tile, count):
    """Ask for `count` tokens' codes in the L2 cache."""
    line = gl.arange(0, 512, layout=gl.BlockedLayout([1], [32], [4], [0])) * 128
    gl.inline_asm_elementwise(
        """{
        .reg .pred asks;
        setp.ne.u32 asks, $2, 0;
        @asks prefetch.global.L2 [$1];
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [(tile.to(gl.int64) + line), (line < count * (4 * WORDS)).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _tile_row(
    table, start, end, first_row, num_pages, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr
):  # fmt: skip
    """Row of the flat cache where a tile starts; any valid one for a tile past the end."""
    if PAGED:
        page = gl.load(table + start // PAGE_SIZE, mask=start < end, other=0)
        page = gl.minimum(gl.maximum(page, 0), num_pages - 1)
        row = page * PAGE_SIZE + start % PAGE_SIZE
    else:
        row = first_row + start
    return row.to(gl.int64)


@gluon.jit
def _widened_tiles(
    left, right, rope, scales, logs, inverses, loaded, valued, cache_ptr, scale_ptr, table,
    first_row, num_pages, begin, end, scale_log2, E4M3: gl.constexpr, PAGED: gl.constexpr,
    PAGE_SIZE: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Fill the tile buffers, and beside them what the scores need of each token's scale."""
    PARTS: gl.constexpr = 512 // COLUMNS + 1
    HALF: gl.constexpr = 256 // COLUMNS
    token_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tokens = gl.arange(0, 64, layout=token_layout)
    num_tiles = gl.cdiv(end - begin, 64)

    row = _tile_row(table, begin, end, first_row, num_pages, PAGED, PAGE_SIZE)
    next_row = _tile_row(table, begin + 64, end, first_row, num_pages, PAGED, PAGE_SIZE)
    token_scale = gl.load(scale_ptr + row + tokens, mask=tokens < end - begin, other=1.0)
    for i in range(num_tiles):
        start = begin + i * 64
        buffer = i % 2
        here = cache_ptr + row * WORDS
        # Not before the last tile's fence, which would wait for them.
        codes = ()
        for part in gl.static_range(DEPTH):
            codes += (_load_part(here, part, end - start, COLUMNS),)  # type: ignore[assignment]
        # Page numbers travel two tiles ahead and scales one, so that nothing waits for them.
        after_next = _tile_row(table, start + 128, end, first_row, num_pages, PAGED, PAGE_SIZE)
        next_scale = gl.load(scale_ptr + next_row + tokens, mask=tokens < end - start - 64,
                             other=1.0)  # fmt: skip
        _prefetch_tile(cache_ptr + next_row * WORDS, gl.minimum(end - start - 64, 64))
        if i > 1:
            mbarrier.wait(valued.index(buffer), ((i - 2) // 2) & 1)
        token_scale = gl.maximum(token_scale, 1e-30)
        scales.index(buffer).store(token_scale * scale_log2)
        logs.index(buffer).store(gl.log2(token_scale))
        inverses.index(buffer).store(1.0 / token_scale)
        left_parts = _as_parts(left.index(buffer), HALF, COLUMNS)
        right_parts = _as_parts(right.index(buffer), HALF, COLUMNS)
        rope_part = _as_parts(rope.index(buffer), 1, 64)
        for part in gl.static_range(PARTS):
            if part < HALF:
                target = left_parts.index(part)
            elif part < 2 * HALF:
                target = right_parts.index(part - HALF)
            else:
                target = rope_part.index(0)
            target.store(widen(codes[part], E4M3))
            if part + DEPTH < PARTS:
                ahead = (_load_part(here, part + DEPTH, end - start, COLUMNS),)
                codes += ahead  # type: ignore[assignment]
        fence_async_shared()
        sync_threads()
        mbarrier.arrive(loaded.index(buffer))
        row = next_row
        next_row = after_next
        token_scale = next_scale


@gluon.jit
def _scores(
    q_left, q_right, q_rope, left, right, rope, p_smem, factor_smem, scales, logs, inverses,
    loaded, scored, valued, begin, end, length, row_start, num_rows, num_heads, lse_ptr, lse_row,
    NUM_QUERY: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    token_layout: gl.constexpr = gl.SliceLayout(0, layout)
    offs = gl.arange(0, 64, layout=token_layout)
    rows = row_start + gl.arange(0, 64, layout=row_layout)
    limit = gl.minimum(length - (NUM_QUERY - 1) + rows // num_heads, end)
    m = gl.full([64], -1e30, gl.float32, row_layout)
    total = gl.full([64], 0.0, gl.float32, row_layout)
    num_tiles = gl.cdiv(end - begin, 64)
    for i in range(num_tiles):
        start = begin + i * 64
        buffer = i % 2
        mbarrier.wait(loaded.index(buffer), (i // 2) & 1)
        s = gl.zeros([64, 64], gl.float32, layout)
        s = warpgroup_mma(
            q_left, left.index(buffer).permute((1, 0)), s, use_acc=False, is_async=True
        )
        s = warpgroup_mma(q_right, right.index(buffer).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_rope, rope.index(buffer).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        scale = scales.index(buffer).load(token_layout)
        s = s * scale[None, :] + logs.index(buffer).load(token_layout)[None, :]
        s = gl.where((start + offs)[None, :] < limit[:, None], s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))
        alpha = gl.exp2(m - m_new)
        p = gl.exp2(s - (m_new - SHIFT)[:, None])
        inverse = inverses.index(buffer).load(token_layout)
        total = total * alpha + gl.sum(p * inverse[None, :], 1)
        m = m_new
        if i > 0:
            mbarrier.wait(valued.index(1 - buffer), ((i - 1) // 2) & 1)
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
def _load_query(ptr, offsets, row_ok, first, smem, COLUMNS: gl.constexpr):
    """Copy query columns first.. into shared memory as fp16, 64 at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    for part in gl.static_range(COLUMNS // 64):
        pointers = ptr + offsets[:, None] + (first + part * 64 + col)[None, :]
        value = gl.load(pointers, mask=row_ok[:, None], other=0.0).to(gl.float32)
        value = gl.minimum(gl.maximum(value, -65504.0), 65504.0)
        smem.slice(part * 64, 64, dim=1).store(value.to(gl.float16))


@gluon.jit(do_not_specialize=["max_tokens", "num_pages", "num_splits"])
def _decode_codes_kernel(
    q_latent_ptr, q_rope_ptr, cache_ptr, scale_ptr, block_table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qq, stride_qh, stride_rb, stride_rq, stride_rh, stride_table,
    num_heads, num_rows, max_tokens, num_pages, num_splits, num_row_blocks, scale_log2,
    E4M3: gl.constexpr, NUM_QUERY: gl.constexpr, PAGED: gl.constexpr, PAGE_SIZE: gl.constexpr,
    SPLIT: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, VALUE_REGISTERS: gl.constexpr,
    WIDEN_REGISTERS: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    row_block = pid % num_row_blocks
    split = (pid // num_row_blocks) % num_splits
    batch = pid // num_row_blocks // num_splits
    length = gl.minimum(gl.maximum(gl.load(seq_lens_ptr + batch), 0), max_tokens)
    tiles_per_split = gl.cdiv(gl.cdiv(length, 64), num_splits)
    begin = split * tiles_per_split * 64
    end = gl.maximum(gl.minimum(begin + tiles_per_split * 64, length), begin)

    half: gl.constexpr = gl.float16
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], half)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], half)
    q_left = gl.allocate_shared_memory(half, [64, 256], wide)
    q_right = gl.allocate_shared_memory(half, [64, 256], wide)
    q_rope = gl.allocate_shared_memory(half, [64, 64], narrow)
    left = gl.allocate_shared_memory(half, [2, 64, 256], wide)
    right = gl.allocate_shared_memory(half, [2, 64, 256], wide)
    rope = gl.allocate_shared_memory(half, [2, 64, 64], narrow)
    p_smem = gl.allocate_shared_memory(half, [64, 64], narrow)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    factor_smem = gl.allocate_shared_memory(gl.float32, [64], vector)
    scales = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    logs = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    inverses = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    valued = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(scored, count=1)
    for buffer in gl.static_range(2):
        mbarrier.init(loaded.index(buffer), count=1)
        mbarrier.init(valued.index(buffer), count=2)

    row_start = row_block * 64
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = row_start + gl.arange(0, 64, layout=gl.SliceLayout(1, blocked))
    row_ok = rows < num_rows
    token = (rows // num_heads).to(gl.int64)
    head = (rows % num_heads).to(gl.int64)
    q_offsets = batch.to(gl.int64) * stride_qb + token * stride_qq + head * stride_qh
    r_offsets = batch.to(gl.int64) * stride_rb + token * stride_rq + head * stride_rh
    _load_query(q_latent_ptr, q_offsets, row_ok, 0, q_left, 256)
    _load_query(q_latent_ptr, q_offsets, row_ok, 256, q_right, 256)
    _load_query(q_rope_ptr, r_offsets, row_ok, 0, q_rope, 64)
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
            (_scores, (q_left, q_right, q_rope, left, right, rope, p_smem, factor_smem, scales,
                       logs, inverses, loaded, scored, valued, begin, end, length, row_start,
                       num_rows, num_heads, lse_ptr, out_row, NUM_QUERY, SPLIT)),
            (_values, (left, p_smem, factor_smem, scored, valued, begin, end, row_start, num_rows,
                       out_ptr, out_row, 0, 128)),
            (_values, (right, p_smem, factor_smem, scored, valued, begin, end, row_start, num_rows,
                       out_ptr, out_row, 1, 128)),
            (_widened_tiles, (left, right, rope, scales, logs, inverses, loaded, valued,
                              cache_ptr, scale_ptr, table, first_row, num_pages, begin, end,
                              scale_log2, E4M3, PAGED, PAGE_SIZE, COLUMNS, DEPTH)),
        ],
        [4, 4, 4],
        [VALUE_REGISTERS, VALUE_REGISTERS, WIDEN_REGISTERS],
    )  # fmt: skip


def kernel_constants(
    e4m3: bool, num_query: int, page_size: int | None, *, is_split: bool
) -> dict[str, Any]:
    return {
        "E4M3": e4m3, "NUM_QUERY": num_query, "PAGED": page_size is not None,
        "PAGE_SIZE": page_size or 64, "SPLIT": is_split, "COLUMNS": COLUMNS, "DEPTH": DEPTH,
        "VALUE_REGISTERS": VALUE_REGISTERS, "WIDEN_REGISTERS": WIDEN_REGISTERS,
    }  # fmt: skip


class ManyHeadsCodesSplits:
    """The kernel for one kind of input; arguments as in `mla_decode_plan.Splits`."""

    def __init__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor | None,
    ) -> None:
        B, Q, H, _ = q_latent_BQHR.shape
        self.row_blocks = triton.cdiv(Q * H, 64)
        self.groups = B * self.row_blocks
        self.numbers = (
            *q_latent_BQHR.stride()[:3], *q_rope_BQHP.stride()[:3],
            block_table.stride(0) if block_table is not None else 0, H, Q * H,
        )  # fmt: skip
        page_size = cache.shape[1] if block_table is not None else None
        e4m3 = cache.dtype == torch.float8_e4m3fn
        self.launches = tuple(
            Launch(
                _decode_codes_kernel,
                kernel_constants(e4m3, Q, page_size, is_split=is_split),
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
        assert cache_scale is not None
        table = seq_lens_B if block_table is None else block_table
        max_tokens = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        self.launches[num_splits > 1](
            (self.groups * num_splits, 1, 1),
            (
                q_latent_BQHR, q_rope_BQHP, cache.view(torch.int32), cache_scale.contiguous(),
                table, seq_lens_B, out, lse,
            ),
            (*self.numbers, max_tokens, cache.shape[0], num_splits, self.row_blocks, scale_log2),
        )  # fmt: skip
