"""The first pass of split-KV decode: attention of each query row to one split of its sequence.

Used by `triton_mla_flash_decode`, whose docstring has the maths and the names of the dimensions.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ic.kernels.launch import Launch
from ic.kernels.mla_decode_launch import DecodeConfig, outer_stride
from ic.kernels.mla_decode_tiles import (
    attend,
    load_quantized,
    load_query,
    tile_offsets,
    tile_pages,
    widen,
)
from ic.kernels.triton_mla_combine import LN2
from ic.kernels.widths import one_tile


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
    PADDED: tl.constexpr = COMBINED and TILE > R + P
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
            if PADDED:
                # A row's last columns would be the next row's, or nobody's.
                k = tl.load(cache_ptr + at[:, None] + cols[None, :], mask=(cols < R + P)[None, :],
                            other=0.0)  # fmt: skip
            else:
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
            R + rope_cols, R + P, COMBINED, PAGED, ONE_PAGE, PAGE_SIZE, DENSE_TOKENS,
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
                tile_cols, R + rope_cols, R + P, COMBINED, PAGED, ONE_PAGE, PAGE_SIZE, DENSE_TOKENS,
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


class TritonSplits:
    """The first pass for one kind of input."""

    def __init__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor | None,
        cache_scale: torch.Tensor | None,
        config: DecodeConfig,
    ) -> None:
        B, Q, H, R = q_latent_BQHR.shape
        P = q_rope_BQHP.shape[3]
        self.row_blocks = triton.cdiv(Q * H, config.block_m)
        self.groups = B * self.row_blocks
        self.bits = config.e4m3_bits and cache.dtype == torch.float8_e4m3fn
        quantized, scale_strides = False, (0, 0)
        if cache_scale is not None:
            quantized, scale_strides = True, (outer_stride(cache_scale), cache_scale.stride(1))
        page_size = 16 if block_table is None else cache.shape[1]
        half = quantized or q_latent_BQHR.dtype == torch.float16
        constants = {
            "NUM_QUERY": Q, "R": R, "P": P, "TILE": one_tile(R, P) or R,
            "COMBINED": config.combined, "PAGED": block_table is not None, "PAGE_SIZE": page_size,
            "SWAP": config.swap, "QUANTIZED": quantized, "E4M3_BITS": self.bits,
            "SHIFT": 14.0 if half else 0.0, "PRECISION": "ieee", "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "STAGES": config.num_stages,
            "DENSE_TOKENS": cache.stride(1) == cache.shape[2],
        }  # fmt: skip
        options = {"maxnreg": config.max_registers} if config.max_registers else {}
        self.launches = tuple(
            Launch(
                _decode_kernel,
                constants | {"SPLIT": is_split, "PDL": config.pdl and is_split},
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **options,
            )
            for is_split in (False, True)
        )
        self.numbers = (
            *q_latent_BQHR.stride()[:3], *q_rope_BQHP.stride()[:3], outer_stride(cache),
            cache.stride(1),
            *scale_strides,
            0 if block_table is None else block_table.stride(0), H, Q * H,
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
        max_tokens = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        self.launches[num_splits > 1](
            (self.groups * num_splits, 1, 1),
            (
                q_latent_BQHR, q_rope_BQHP, cache.view(torch.uint8) if self.bits else cache,
                cache_scale, block_table, seq_lens_B, out, lse,
            ),
            (*self.numbers, max_tokens, cache.shape[0], num_splits, self.row_blocks, scale_log2),
        )  # fmt: skip
