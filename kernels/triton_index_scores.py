"""Index scores of all keys: the first half of an indexer; `triton_index_choice` is the second.

    I[t, s] = sum over j of w[t, j] relu(q[t, j] . k[s]), or -inf where t does not see s

J index heads share one key of I dimensions per token (DeepSeek-V3.2's lightning indexer, arXiv
2512.02556).

Tiling: a program takes BLOCK_T queries with all their heads, the rows of one product, and BLOCK_S
keys. ReLU, weights and the sum over the heads happen in registers. A quantised key's scale is
positive, so it multiplies the sum. Keys that none of a program's queries sees are not read.

Memory traffic: keys once for every BLOCK_T queries, I or 2 I bytes each; scores, 4 bytes each,
written once.

Limits: I a power of two of at least 16; J up to 64, padded to a power of two; pages of a multiple
of 16 tokens. Offsets are int64.

Legend: B rows, T queries, S keys, J index heads, I index head dim, N pages of a row.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import require
from ic.kernels.launch import Launch, Launches, is_eager
from ic.kernels.mla_decode_checks import check_devices
from ic.kernels.mla_decode_launch import device_of, outer_stride
from ic.kernels.mla_decode_tiles import widen

MAX_HEADS = 64
_ROWS_DECODE, _ROWS_PREFILL = 16, 64
BLOCK_S = 128


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def index_scores_kernel(
    q_ptr, w_ptr, key_ptr, scale_ptr, table_ptr, first_ptr, last_ptr, score_ptr,
    stride_outer, stride_token, stride_scale_outer, stride_table, num_queries, num_keys, num_pages,
    J: tl.constexpr, JOINED: tl.constexpr, DIM: tl.constexpr, QUANTIZED: tl.constexpr,
    E4M3_BITS: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_S keys for BLOCK_T queries of one row; JOINED pads J to a power of two."""
    blocks = tl.cdiv(num_queries, BLOCK_T)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks) * BLOCK_T
    rows = tl.arange(0, BLOCK_T * JOINED)
    token = begin + rows // JOINED
    head = rows % JOINED
    row_ok = (token < num_queries) & (head < J)
    at_row = (batch * num_queries + token) * J + head
    dims = tl.arange(0, DIM)
    q = tl.load(q_ptr + at_row[:, None] * DIM + dims[None, :], mask=row_ok[:, None], other=0.0)
    w = tl.load(w_ptr + at_row, mask=row_ok, other=0.0)
    t = begin + tl.arange(0, BLOCK_T)
    query_ok = t < num_queries
    first = tl.load(first_ptr + batch * num_queries + t, mask=query_ok, other=2147483647)
    last = tl.load(last_ptr + batch * num_queries + t, mask=query_ok, other=-1)
    n = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    # What no query sees is not read: of a cache for a million tokens that holds a few, most.
    key_ok = (n < num_keys) & (n >= tl.min(first, 0)) & (n <= tl.max(last, 0))
    if PAGED:
        page = tl.load(table_ptr + batch * stride_table + n // PAGE_SIZE, mask=key_ok, other=0)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        at = page * stride_outer + (n % PAGE_SIZE) * stride_token
        at_scale = page * stride_scale_outer + n % PAGE_SIZE
    else:
        at = batch * stride_outer + n.to(tl.int64) * stride_token
        at_scale = batch * stride_scale_outer + n
    k = tl.load(key_ptr + at[:, None] + dims[None, :], mask=key_ok[:, None], other=0.0)
    if QUANTIZED:
        k = widen(k, E4M3_BITS)
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    weighted = tl.maximum(products, 0.0) * w[:, None]
    score = tl.sum(tl.reshape(weighted, (BLOCK_T, JOINED, BLOCK_S)), 1)
    if QUANTIZED:
        factor = tl.load(scale_ptr + at_scale, mask=key_ok, other=1.0)
        score = score * (factor * 256.0 if E4M3_BITS else factor)[None, :]
    visible = (n[None, :] >= first[:, None]) & (n[None, :] <= last[:, None])
    score = tl.where(visible, score, float("-inf"))
    at_score = (batch * num_queries + t)[:, None] * num_keys + n[None, :]
    tl.store(score_ptr + at_score, score, mask=query_ok[:, None] & (n < num_keys)[None, :])


def index_tile(num_queries: int, num_heads: int) -> tuple[int, int, int]:
    """(queries a program, heads padded, warps)."""
    joined = triton.next_power_of_2(num_heads)
    rows = _ROWS_DECODE if num_queries * joined <= _ROWS_DECODE else _ROWS_PREFILL
    return max(rows // joined, 1), joined, 4


_launches = Launches()


def index_scores(
    q_BTJI: Tensor,
    w_BTJ: Tensor,
    keys: Tensor,
    first_BT: Tensor,
    last_BT: Tensor,
    *,
    key_scale: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Scores (B, T, S) float32 of each key for each query; without gradients.

    Args:
        q_BTJI, w_BTJ: index queries, and float32 weights of their heads with every scale within.
        keys: (B, S, I), or (pages, page size, I) with a block table, whose pages S counts. The
            dtype of the queries, or float8_e4m3fn or int8 together with `key_scale`.
        first_BT, last_BT: int32, the places of the first and the last key that a query sees.
        key_scale: fp32 scale of each key, (B, S) or (pages, page size).
        block_table: int32 (B, N), page numbers of each row in order. A number outside the cache is
            clamped.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    given = q_BTJI, w_BTJ, keys, first_BT, last_BT, key_scale, block_table
    if is_eager(*given):
        return _compute(*given)
    return _index_scores_op(*given)


@torch.library.custom_op("ic::index_scores", mutates_args=())
def _index_scores_op(
    q: Tensor,
    w: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    key_scale: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    return _compute(q, w, keys, first, last, key_scale, block_table)


@_index_scores_op.register_fake
def _(
    q: Tensor,
    w: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    key_scale: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    held = keys.shape[1] * (1 if block_table is None else block_table.shape[1])
    return q.new_empty(*q.shape[:2], held, dtype=torch.float32)


def _compute(
    q: Tensor,
    w: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    key_scale: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    _check(q, w, keys, first, last, key_scale, block_table)
    q, w, first, last = (x.contiguous() for x in (q, w, first, last))
    batch, queries, heads, dim = q.shape
    paged = block_table is not None
    held = keys.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    scores = torch.empty(batch, queries, held, dtype=torch.float32, device=q.device)
    if not scores.numel():
        return scores
    device = device_of(keys)
    bits = keys.dtype == torch.float8_e4m3fn and (device.capability < 89 or device.interpreted)
    block_t, joined, warps = index_tile(queries, heads)
    page = keys.shape[1] if paged else 16
    stride_scale = 0 if key_scale is None else outer_stride(key_scale)
    stride_table = 0 if block_table is None else block_table.stride(0)
    constants = {
        "J": heads, "JOINED": joined, "DIM": dim, "QUANTIZED": key_scale is not None,
        "E4M3_BITS": bits, "PAGED": paged, "PAGE_SIZE": page, "BLOCK_T": block_t,
        "BLOCK_S": BLOCK_S,
    }  # fmt: skip
    strides = outer_stride(keys), keys.stride(1), stride_scale, stride_table
    key = (*constants.values(), q.dtype, keys.dtype, q.get_device(), strides, len(keys) == 1)
    launch = _launches.get(key)
    if launch is None:
        launch = _launches[key] = Launch(index_scores_kernel, constants, num_warps=warps)
    launch(
        (batch * triton.cdiv(queries, block_t), triton.cdiv(held, BLOCK_S), 1),
        (
            q, w, keys.view(torch.uint8) if bits else keys, key_scale, block_table, first, last,
            scores,
        ),
        (*strides, queries, held, len(keys)),
    )  # fmt: skip
    return scores


def _check(
    q: Tensor,
    w: Tensor,
    keys: Tensor,
    first: Tensor,
    last: Tensor,
    key_scale: Tensor | None,
    block_table: Tensor | None,
) -> None:
    require(q.dim() == 4, f"q has shape {tuple(q.shape)}; want (B, T, J, I)")
    batch, queries, heads, dim = q.shape
    require(
        dim >= 16 and dim & (dim - 1) == 0 and 1 <= heads <= MAX_HEADS,
        f"q has {heads} heads of {dim}; want 1 to {MAX_HEADS} of a power of two from 16 on",
    )
    require(
        q.dtype in (torch.bfloat16, torch.float16, torch.float32),
        f"q is {q.dtype}; allowed are bfloat16, float16 and float32",
    )
    require(
        w.shape == (batch, queries, heads) and w.dtype == torch.float32,
        f"w is {w.dtype} {tuple(w.shape)}; want float32 {(batch, queries, heads)}",
    )
    require(
        keys.dim() == 3 and keys.shape[2] == dim and keys.stride(2) == 1,
        f"keys has shape {tuple(keys.shape)} and strides {keys.stride()}; want (B, S, {dim}) or "
        f"(pages, page size, {dim}) with contiguous keys",
    )
    for name, x in (("first", first), ("last", last)):
        require(
            x.shape == (batch, queries) and x.dtype == torch.int32,
            f"{name} is {x.dtype} {tuple(x.shape)}; want int32 {(batch, queries)}",
        )
    if key_scale is None:
        require(keys.dtype == q.dtype, f"keys is {keys.dtype}, but q {q.dtype}")
    else:
        require(
            keys.dtype in (torch.float8_e4m3fn, torch.int8),
            f"keys is {keys.dtype}; with key_scale it must be float8_e4m3fn or int8",
        )
        require(
            key_scale.shape == keys.shape[:2]
            and key_scale.dtype == torch.float32
            and (key_scale.shape[1] <= 1 or key_scale.stride(1) == 1),
            f"key_scale is {key_scale.dtype} {tuple(key_scale.shape)}; want float32 "
            f"{tuple(keys.shape[:2])} with contiguous rows",
        )
    if block_table is None:
        require(len(keys) == batch, f"keys holds {len(keys)} rows, but q has {batch}")
    else:
        require(
            keys.shape[1] % 16 == 0 and len(keys) >= 1,
            f"keys has pages of {keys.shape[1]} tokens; want a multiple of 16, and a page at least",
        )
        require(
            block_table.dtype == torch.int32
            and block_table.dim() == 2
            and len(block_table) == batch
            and (block_table.shape[1] <= 1 or block_table.stride(1) == 1),
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; want int32 "
            f"({batch}, pages) with contiguous rows",
        )
    check_devices(
        {
            "q": q, "w": w, "keys": keys, "first": first, "last": last, "key_scale": key_scale,
            "block_table": block_table,
        }
    )  # fmt: skip
