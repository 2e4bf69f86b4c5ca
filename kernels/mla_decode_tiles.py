"""Steps of the decode kernel on one tile: addresses, widening of a quantised cache, online softmax.

Used by `triton_mla_flash_decode`, whose docstring has the maths and the names of the dimensions.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_query(ptr, row_offsets, row_ok, cols, FIRST, WIDTH, SWAP: tl.constexpr):
    """Columns FIRST.. of the query rows, [rows, cols] or transposed; zero outside."""
    col_ok = (cols >= FIRST) & (cols < FIRST + WIDTH)
    if SWAP:
        pointers = ptr + row_offsets[None, :] + (cols - FIRST)[:, None]
        return tl.load(pointers, mask=col_ok[:, None] & row_ok[None, :], other=0.0)
    else:
        pointers = ptr + row_offsets[:, None] + (cols - FIRST)[None, :]
        return tl.load(pointers, mask=col_ok[None, :] & row_ok[:, None], other=0.0)


@triton.jit
def attend(
    q, q_rope, k, k_rope, factor, token_scale, visible, m, total, acc,
    COMBINED: tl.constexpr, SWAP: tl.constexpr, QUANTIZED: tl.constexpr, SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One online-softmax step in base 2; with SWAP and full precision `total` stays unreduced."""
    TOKENS: tl.constexpr = 0 if SWAP else 1
    ROWS: tl.constexpr = 1 - TOKENS
    if SWAP:
        s = tl.dot(k, q, input_precision=PRECISION)
        if not COMBINED:
            s = tl.dot(k_rope, q_rope, acc=s, input_precision=PRECISION)
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not COMBINED:
            s = tl.dot(q_rope, tl.trans(k_rope), acc=s, input_precision=PRECISION)
    if QUANTIZED:
        token_scale = tl.maximum(token_scale, 1e-30)
        s = s * tl.expand_dims(token_scale, ROWS) + tl.expand_dims(tl.log2(token_scale), ROWS)
    else:
        s = s * factor
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, TOKENS))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - tl.expand_dims(m_new - SHIFT, TOKENS))
    mass = p
    if QUANTIZED:
        mass = p * tl.expand_dims(1.0 / token_scale, ROWS)
    if SWAP and not QUANTIZED:
        total = total * tl.expand_dims(alpha, TOKENS) + mass
    else:
        total = total * alpha + tl.sum(mass, TOKENS)
    acc = acc * tl.expand_dims(alpha, TOKENS)
    if SWAP:
        acc = tl.dot(tl.trans(k), p.to(k.dtype), acc=acc, input_precision=PRECISION)
    else:
        acc = tl.dot(p.to(k.dtype), k, acc=acc, input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def tile_pages(table, start, offs, end, ONE_PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Page numbers of a tile: one, or one a token; nothing is read if it starts at `end`."""
    if ONE_PAGE:
        return tl.load(table + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        n = tl.minimum(start + offs, end - 1)
        return tl.load(table + n // PAGE_SIZE, mask=offs * 0 + start < end, other=0)


@triton.jit
def tile_offsets(
    page, start, offs, end, num_pages, outer, stride_outer, stride_token,
    PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """int64 element offsets of a tile's tokens; from `end` on they repeat the last token."""
    n = tl.minimum(start + offs, end - 1)
    if PAGED:
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        if ONE_PAGE:
            first = page * stride_outer + (start % PAGE_SIZE) * stride_token
            return first + (n - start) * stride_token
        else:
            return page * stride_outer + (n % PAGE_SIZE) * stride_token
    else:
        return outer + n.to(tl.int64) * stride_token


@triton.jit
def widen(raw, E4M3_BITS: tl.constexpr):
    """e4m3 or int8 to fp16, exactly; with E4M3_BITS the result is 2^-8 of the value."""
    if E4M3_BITS:
        bits = raw.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    elif raw.dtype == tl.int8:
        # 0x6400 is 1024 in fp16, whose last bit is then worth 1.
        bits = (raw.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152.0
    else:
        return raw.to(tl.float16)


@triton.jit
def load_quantized(
    cache_ptr, scale_ptr, page, start, offs, end, num_pages, outer, stride_outer, stride_token,
    scale_outer, stride_scale_outer, stride_scale_token, cols, rope_cols, WIDTH: tl.constexpr,
    COMBINED: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DENSE_TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile's codes (latent, rope) and scales; tokens from `end` on are 0 with scale 1, and so are
    columns from WIDTH on, the numbers of a token.

    With DENSE_TOKENS the token stride is a constant, so that the rows of a tile are at constant
    distances and need no registers of their own.
    """
    ok = offs < end - start
    if PAGED:
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        at = page * stride_outer
        scale_at = page * stride_scale_outer
        if ONE_PAGE:
            first = start % PAGE_SIZE
            within = offs
        else:
            first = 0
            within = (start + offs) % PAGE_SIZE
    else:
        first = start
        within = offs
        at = outer
        scale_at = scale_outer
    scale_at += tl.cast(first, tl.int64) * stride_scale_token
    token_scale = tl.load(scale_ptr + scale_at + within * stride_scale_token, mask=ok, other=1.0)
    at += tl.cast(first, tl.int64) * stride_token
    if DENSE_TOKENS:
        at += within * WIDTH
    else:
        at += within * stride_token
    within_row = ok[:, None]
    if COMBINED and cols.shape[0] > WIDTH:
        within_row = within_row & (cols < WIDTH)[None, :]
    raw = tl.load(cache_ptr + at[:, None] + cols[None, :], mask=within_row, other=0.0)
    raw_rope = raw
    if not COMBINED:
        raw_rope = tl.load(
            cache_ptr + at[:, None] + rope_cols[None, :], mask=ok[:, None], other=0.0
        )
    return raw, raw_rope, token_scale
