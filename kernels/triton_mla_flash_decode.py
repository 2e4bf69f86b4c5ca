"""MLA decode over a latent cache in the absorbed form: split-KV attention and a combine pass.

B sequences, Q new tokens (1 to 4), H heads, R kv_lora_rank, P qk_rope_head_dim, S cached tokens.

What. A cached token is one row c = [latent (R) | rotated rope key (P)], shared by all heads. A
query row is q = [q_nope W_UK (R) | rotated q_rope (P)]. For every query token t and head h

    s_j = softmax_scale * q . c_j          over the cached tokens j that t may see
    out = sum_j softmax(s)_j c_j[:R]       lse = log sum_j exp(s_j)

so the latent is key and value at once and is read once. The Q query tokens are the last Q of the
sequence: token t sees the first length - Q + 1 + t. A row that sees nothing gives 0 and lse -inf.

Tiling. A program holds the query rows of one sequence (BLOCK_M of the Q*H) and walks one split of
its tokens in tiles of BLOCK_N. Where R + P is a power of two (192+64, 448+64, 96+32) one tile of
width R + P is both key and value and the last P output columns are dropped: no padding, no second
load. Otherwise latent and rope key are two tiles. With few rows (SWAP) the tile is the left
operand, S^T = C Q^T and O^T = C^T P^T, so a Hopper warpgroup multiplies 64 tokens by 16 heads with
nothing wasted on padding.

A quantised cache (e4m3 or int8, one fp32 scale a token) is widened to fp16 in registers. The scale
d of a token enters as s_j + log2(d): the probability that multiplies the widened row is then at
most 1 whatever the scales are, and the sum of probabilities divides by d again. fp16 probabilities
are shifted by 2^14, so that the many small ones of a long context are not lost to fp16's range.
On Hopper `gluon_mla_decode_e4m3` takes e4m3 caches and few rows instead, without widening the keys.

Memory traffic. B*S*(R+P)*itemsize (+ 4 bytes a token of scale) once for every BLOCK_M rows, which
share it through L2; partial results cost 4*(R+1) bytes a row and split, written and read once.

Limits. R a multiple of 16; R + P a power of two, or R and P each a power of two. At most 4 query
tokens. Page size a multiple of 16. Offsets are int64: a cache may hold more than 2^31 elements.
A page number outside the cache is clamped in the kernel, so it can never cause an illegal access;
`check_indices=True` reports it. Rows past a sequence's end are never read, whatever they hold.

Source. FlashDecoding's split and combine (Dao et al., 2023); the absorbed form is DeepSeek-V2's
(arXiv 2405.04434, 2.1); the 64-row tile with 8 warps is FlashMLA's.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ic.kernels.mla_decode_launch import (
    LOG2E,
    DecodeConfig,
    check_decode_arguments,
    check_decode_indices,
    choose_decode_config,
    choose_num_splits,
    many_heads_applies,
)
from ic.kernels.mla_decode_tiles import (
    attend,
    load_quantized,
    load_query,
    tile_offsets,
    tile_pages,
    widen,
)
from ic.kernels.triton_mla_combine import LN2, combine


@triton.jit(do_not_specialize=["max_tokens", "num_pages", "num_splits"])
def _decode_kernel(
    q_latent_ptr, q_rope_ptr, cache_ptr, scale_ptr, block_table_ptr, seq_lens_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qq, stride_qh, stride_rb, stride_rq, stride_rh,
    stride_outer, stride_token, stride_scale_outer, stride_scale_token, stride_table,
    num_heads, num_rows, max_tokens, num_pages, num_splits, num_row_blocks, scale_log2,
    NUM_QUERY: tl.constexpr, R: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    COMBINED: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, SWAP: tl.constexpr,
    QUANTIZED: tl.constexpr, E4M3_BITS: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    DENSE_TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for BLOCK_M query rows; quantised tiles are widened one ahead."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    row_block = pid % num_row_blocks
    split = (pid // num_row_blocks) % num_splits
    batch = (pid // num_row_blocks // num_splits).to(tl.int64)
    COMPUTE: tl.constexpr = tl.float16 if QUANTIZED else cache_ptr.dtype.element_ty
    ONE_PAGE: tl.constexpr = PAGED and PAGE_SIZE % BLOCK_N == 0
    ROPE_WIDTH: tl.constexpr = 16 if COMBINED else P
    TOKENS: tl.constexpr = 0 if SWAP else 1
    ROWS: tl.constexpr = 1 - TOKENS

    length = tl.minimum(tl.maximum(tl.load(seq_lens_ptr + batch), 0), max_tokens)
    tiles_per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits)
    begin = split * tiles_per_split * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, length)

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < num_rows
    token = rows // num_heads
    head = rows % num_heads
    cols = tl.arange(0, TILE)
    rope_cols = tl.arange(0, ROPE_WIDTH)
    q_offsets = batch * stride_qb + token * stride_qq + head * stride_qh
    r_offsets = batch * stride_rb + token * stride_rq + head * stride_rh
    q = load_query(q_latent_ptr, q_offsets, row_ok, cols, 0, R, SWAP)
    q_rope = q
    if COMBINED:
        if P > 0:
            q += load_query(q_rope_ptr, r_offsets, row_ok, cols, R, P, SWAP)
    else:
        q_rope = load_query(q_rope_ptr, r_offsets, row_ok, rope_cols, 0, P, SWAP)
    if QUANTIZED:
        # The factor goes into the query here: one product less for every score.
        q = tl.clamp(q.to(tl.float32) * scale_log2, -65504.0, 65504.0)
        q_rope = tl.clamp(q_rope.to(tl.float32) * scale_log2, -65504.0, 65504.0)
    q = q.to(COMPUTE)
    q_rope = q_rope.to(COMPUTE)

    m = tl.full([BLOCK_M], -1e30, tl.float32)
    if SWAP and not QUANTIZED:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    if SWAP:
        acc = tl.zeros([TILE, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, TILE], tl.float32)
    table = block_table_ptr
    if PAGED:
        table += batch * stride_table
    outer = batch * stride_outer
    scale_outer = batch * stride_scale_outer
    offs = tl.arange(0, BLOCK_N)
    limit = tl.minimum(length - (NUM_QUERY - 1) + token, end)
    page = 0
    if PAGED:
        page = tile_pages(table, begin, offs, end, ONE_PAGE, PAGE_SIZE)
    if not QUANTIZED:
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            at = tile_offsets(page, start, offs, end, num_pages, outer, stride_outer, stride_token,
                               PAGED, ONE_PAGE, PAGE_SIZE)  # fmt: skip
            if PAGED:
                page = tile_pages(table, start + BLOCK_N, offs, end, ONE_PAGE, PAGE_SIZE)
            k = tl.load(cache_ptr + at[:, None] + cols[None, :])
            k_rope = k
            if not COMBINED:
                k_rope = tl.load(cache_ptr + at[:, None] + (R + rope_cols)[None, :])
            n = start + offs
            visible = tl.expand_dims(n < end, ROWS)
            if NUM_QUERY > 1:
                visible = tl.expand_dims(n, ROWS) < tl.expand_dims(limit, TOKENS)
            m, total, acc = attend(q, q_rope, k, k_rope, scale_log2, 1.0, visible, m, total, acc,
                                COMBINED, SWAP, False, SHIFT, PRECISION)  # fmt: skip
    else:
        # Eight values a thread: as fp16 they are 16 bytes, stored without bank conflicts.
        tile_cols = tl.max_contiguous(tl.arange(0, TILE), 8)
        raw, raw_rope, token_scale = load_quantized(
            cache_ptr, scale_ptr, page, begin, offs, end, num_pages, outer, stride_outer,
            stride_token, scale_outer, stride_scale_outer, stride_scale_token, tile_cols,
            R + rope_cols, COMBINED, PAGED, ONE_PAGE, PAGE_SIZE, DENSE_TOKENS,
        )  # fmt: skip
        k = widen(raw, E4M3_BITS)
        k_rope = k
        if not COMBINED:
            k_rope = widen(raw_rope, E4M3_BITS)
        if PAGED:
            page = tile_pages(table, begin + BLOCK_N, offs, end, ONE_PAGE, PAGE_SIZE)
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            raw, raw_rope, next_scale = load_quantized(
                cache_ptr, scale_ptr, page, start + BLOCK_N, offs, end, num_pages, outer,
                stride_outer, stride_token, scale_outer, stride_scale_outer, stride_scale_token,
                tile_cols, R + rope_cols, COMBINED, PAGED, ONE_PAGE, PAGE_SIZE, DENSE_TOKENS,
            )  # fmt: skip
            if PAGED:
                page = tile_pages(table, start + 2 * BLOCK_N, offs, end, ONE_PAGE, PAGE_SIZE)
            n = start + offs
            visible = tl.expand_dims(n < end, ROWS)
            if NUM_QUERY > 1:
                visible = tl.expand_dims(n, ROWS) < tl.expand_dims(limit, TOKENS)
            m, total, acc = attend(q, q_rope, k, k_rope, 1.0,
                                   token_scale * 256.0 if E4M3_BITS else token_scale, visible, m,
                                   total, acc, COMBINED, SWAP, True, SHIFT, PRECISION)  # fmt: skip
            token_scale = next_scale
            k = widen(raw, E4M3_BITS)
            k_rope = k
            if not COMBINED:
                k_rope = widen(raw_rope, E4M3_BITS)

    mass = tl.sum(total, 0) if SWAP and not QUANTIZED else total
    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    lse = tl.where(empty, float("-inf"), m - SHIFT + tl.log2(mass))
    at_row = batch * num_rows + rows
    if SPLIT:
        at_row = (batch * num_splits + split) * num_rows + rows
    else:
        lse = lse * LN2
    tl.store(lse_ptr + at_row, lse, mask=row_ok)
    acc = acc * tl.expand_dims(1.0 / mass, 0 if SWAP else 1)
    if SWAP:
        tl.store(out_ptr + (at_row * R)[None, :] + cols[:, None], acc,
                 mask=(cols < R)[:, None] & row_ok[None, :])  # fmt: skip
    else:
        tl.store(out_ptr + (at_row * R)[:, None] + cols[None, :], acc,
                 mask=(cols < R)[None, :] & row_ok[:, None])  # fmt: skip


def launch_decode(
    q_latent_BQHR: torch.Tensor,
    q_rope_BQHP: torch.Tensor,
    cache: torch.Tensor,
    seq_lens_B: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_scale: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int,
    config: DecodeConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run both passes with a given configuration; arguments are taken as checked."""
    B, Q, H, R = q_latent_BQHR.shape
    P = q_rope_BQHP.shape[3]
    rows = Q * H
    paged = block_table is not None
    page_size = cache.shape[1] if paged else 16
    max_tokens = block_table.shape[1] * page_size if block_table is not None else cache.shape[1]
    row_blocks = triton.cdiv(rows, config.block_m)
    quantized = cache_scale is not None
    out, lse = _empty_outputs(q_latent_BQHR)
    partial, partial_lse = out, lse
    if num_splits > 1:
        partial = q_latent_BQHR.new_empty(B, num_splits, rows, R, dtype=torch.float32)
        partial_lse = lse.new_empty(B, num_splits, rows)
    pdl = {"launch_pdl": True} if config.pdl and num_splits > 1 else {}
    if config.many_heads and many_heads_applies(q_latent_BQHR, q_rope_BQHP, cache, paged):
        from ic.kernels.gluon_mla_decode import launch_many_heads

        launch_many_heads(
            q_latent_BQHR, q_rope_BQHP, cache, seq_lens_B, block_table, softmax_scale * LOG2E,
            num_splits, partial, partial_lse,
        )  # fmt: skip
        if num_splits > 1:
            combine(partial, partial_lse, out, lse, rows, {})
        return out, lse
    if config.e4m3_codes:
        from ic.kernels.gluon_mla_decode_e4m3 import launch_e4m3

        assert cache_scale is not None
        launch_e4m3(
            q_latent_BQHR, q_rope_BQHP, cache, seq_lens_B, block_table, cache_scale,
            softmax_scale * LOG2E, num_splits, config, partial, partial_lse,
        )  # fmt: skip
        if num_splits > 1:
            combine(partial, partial_lse, out, lse, rows, pdl)
        return out, lse
    bits = config.e4m3_bits and cache.dtype == torch.float8_e4m3fn
    half = quantized or q_latent_BQHR.dtype == torch.float16
    _decode_kernel[(B * num_splits * row_blocks,)](
        q_latent_BQHR, q_rope_BQHP, cache.view(torch.uint8) if bits else cache,
        cache_scale, block_table, seq_lens_B, partial, partial_lse,
        *q_latent_BQHR.stride()[:3], *q_rope_BQHP.stride()[:3], *cache.stride()[:2],
        *(cache_scale.stride() if cache_scale is not None else (0, 0)),
        block_table.stride(0) if block_table is not None else 0,
        H, rows, max_tokens, cache.shape[0], num_splits, row_blocks, softmax_scale * LOG2E,
        NUM_QUERY=Q, R=R, P=P, TILE=R + P if config.combined else R, COMBINED=config.combined,
        PAGED=paged, PAGE_SIZE=page_size, SWAP=config.swap, QUANTIZED=quantized, E4M3_BITS=bits,
        SHIFT=14.0 if half else 0.0, PRECISION="ieee", BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.num_stages, SPLIT=num_splits > 1, PDL=bool(pdl),
        DENSE_TOKENS=cache.stride(1) == cache.shape[2],
        num_warps=config.num_warps, num_stages=config.num_stages,
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
    )  # fmt: skip
    if num_splits > 1:
        combine(partial, partial_lse, out, lse, rows, pdl)
    return out, lse


def _empty_outputs(q_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)
    return q_latent.new_empty(q_latent.shape), lse


@torch.library.custom_op("ic::mla_decode", mutates_args=())
def _mla_decode_op(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_scale: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    config = choose_decode_config(q_latent, q_rope, cache, block_table is not None)
    if q_latent.numel() == 0:
        return _empty_outputs(q_latent)
    return launch_decode(
        q_latent,
        q_rope,
        cache,
        seq_lens,
        block_table,
        cache_scale,
        softmax_scale,
        num_splits,
        config,
    )


@_mla_decode_op.register_fake
def _(q_latent: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_outputs(q_latent)


def mla_decode(
    q_latent_BQHR: torch.Tensor,
    q_rope_BQHP: torch.Tensor,
    cache: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    softmax_scale: float,
    block_table: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    max_context_tokens: int | None = None,
    num_splits: int | None = None,
    check_indices: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last Q tokens of each sequence over its latent cache, in the absorbed form.

    Args:
        q_latent_BQHR: queries after absorption (`q_nope W_UK`), (B, Q, H, R), Q from 1 to 4.
        q_rope_BQHP: rotated rope part, (B, Q, H, P); P may be 0.
        cache: (num_pages, page_size, R + P) with a block table, else (B, S, R + P). The dtype of
            the queries, or float8_e4m3fn or int8 together with `cache_scale`.
        seq_lens_B: int32 (B,), cached tokens of each sequence, the Q new ones included; 0 is
            allowed.
        softmax_scale: factor on the scores, usually
            (qk_nope_head_dim + qk_rope_head_dim) ** -0.5.
        block_table: int32 (B, max_pages), page numbers of each sequence in order.
        cache_scale: fp32 scale of each token, (num_pages, page_size) or (B, S).
        max_context_tokens: the longest length in the batch if the caller knows it; it only chooses
            the number of splits. Default: what the block table or the cache can hold.
        num_splits: overrides that choice.
        check_indices: compare lengths and page numbers with their limits first. This waits for the
            device; turn it off in a serving loop that builds its own tables and inside CUDA graphs.
            Off, lengths are clamped to the cache and page numbers to existing pages.

    Returns:
        out (B, Q, H, R) in the queries' dtype, and lse (B, Q, H) fp32, natural logarithm. A query
        token that sees no token gives 0 and -inf.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    check_decode_arguments(q_latent_BQHR, q_rope_BQHP, cache, seq_lens_B, block_table, cache_scale)
    if check_indices:
        check_decode_indices(cache, seq_lens_B, block_table)
    if num_splits is None:
        num_splits = choose_num_splits(
            q_latent_BQHR, q_rope_BQHP, cache, block_table, max_context_tokens
        )
    elif num_splits < 1:
        raise ValueError(f"num_splits is {num_splits}; it must be at least 1")
    return _mla_decode_op(
        q_latent_BQHR, q_rope_BQHP, cache, seq_lens_B, block_table, cache_scale,
        float(softmax_scale), num_splits,
    )  # fmt: skip
