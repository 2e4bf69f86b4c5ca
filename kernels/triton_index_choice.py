"""The highest scores of each row: the second half of an indexer, behind `triton_index_scores`.

For a query that sees the keys first..last, the `top_k` of the highest score, all if it sees fewer.
Of equal scores the later keys are taken, so that a choice does not depend on how queries were cut
into calls; -0 is 0. They are returned by their place. `torch.topk` makes no promise about ties, and
took longer than dense attention over the same tokens (docs/sparse_attention.md).

A radix selection: scores as 32 bits that are ordered as they are, 8 bits at a time from the top.

- Four launches count the digits of the scores that agree with the threshold so far, and each
  begins by reading off the counts before it one more digit of the threshold. Counts of a row's
  programs are added up by atomics of integers, whose order changes nothing.
- One launch counts, for each program's chunk of a row, the scores above the threshold, which is
  now whole, and those equal to it.
- One launch sums up what the chunks before its own hold, which is where its keys begin in the
  result, and writes them in order.

Memory traffic: a row's visible scores six times, 4 bytes each, from L2 where they fit; 1 KiB of
counts per row and digit; 8 bytes for each chosen key. Nothing waits for the host, and keys outside
first..last are not read.

Limits: S below 2^31 - 2^20. Offsets are int64.

Legend: B rows, T queries, S keys, K chosen keys.
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

BLOCK, WARPS = 2048, 4
# Chunks of a row, whose counts each program sums up; and programs of a launch, if rows allow.
MAX_CHUNKS, _PROGRAMS = 512, 2048
_MAX_KEYS = 2**31 - 2**20
_DIGITS = 4
_ANY = ["stride_row", "num_keys", "top_k", "num_chunks", "chunk_blocks"]


@triton.jit
def _load(score_ptr, at, ok):
    """Scores as uint32 that are ordered alike."""
    score = tl.load(score_ptr + at, mask=ok, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # no negative zero
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _seen(first_ptr, last_ptr, row, num_keys, top_k):
    """(first visible key, first behind them, how many are chosen) of a row."""
    first = tl.minimum(tl.maximum(tl.load(first_ptr + row), 0), num_keys)
    end = tl.maximum(tl.minimum(tl.load(last_ptr + row), num_keys - 1) + 1, 0)
    return first, end, tl.minimum(tl.maximum(end - first, 0), top_k)


@triton.jit
def _narrow(count_ptr, state_ptr, row, wanted, is_first, DIGITS: tl.constexpr):
    """The first DIGITS digits of the threshold, and how many of the scores that agree with it in
    them are wanted. `is_first`, a row's first program, keeps both for the next launch.
    """
    threshold = tl.full((), 0, tl.uint32)
    left = wanted
    if DIGITS > 0:
        if DIGITS > 1:
            before = state_ptr + (row * 4 + DIGITS - 2) * 2
            threshold = tl.load(before).to(tl.uint32, bitcast=True)
            left = tl.load(before + 1)
        digits = tl.arange(0, 256)
        count = tl.load(count_ptr + (row * 4 + DIGITS - 1) * 256 + digits)
        at_least = tl.cumsum(count, 0, reverse=True)
        digit = tl.sum((at_least >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(digits > digit, count, 0), 0)
        threshold = (threshold << 8) | digit.to(tl.uint32)
        if is_first:
            here = state_ptr + (row * 4 + DIGITS - 1) * 2
            tl.store(here, threshold.to(tl.int32, bitcast=True))
            tl.store(here + 1, left)
    return threshold, left


@triton.jit(do_not_specialize=_ANY)
def _count_digits_kernel(
    score_ptr, first_ptr, last_ptr, count_ptr, state_ptr,
    stride_row, num_keys, top_k, num_chunks, chunk_blocks,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up how often each value of the digit behind DIGITS is in a chunk."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    first, end, wanted = _seen(first_ptr, last_ptr, row, num_keys, top_k)
    threshold, _left = _narrow(count_ptr, state_ptr, row, wanted, chunk == 0, DIGITS)
    begin = chunk * chunk_blocks * BLOCK
    stop = tl.minimum(begin + chunk_blocks * BLOCK, end)
    begin += tl.maximum(first - begin, 0) // BLOCK * BLOCK
    total = tl.zeros([256], tl.int32)
    for start in range(begin, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n >= first) & (n < stop)
        score = _load(score_ptr, row * stride_row + n, ok)
        if DIGITS > 0:
            ok = ok & ((score >> (32 - 8 * DIGITS)) == threshold)
        digit = ((score >> (24 - 8 * DIGITS)) & 255).to(tl.int32)
        total += tl.histogram(digit, 256, mask=ok)
    at = (row * 4 + DIGITS) * 256 + tl.arange(0, 256)
    tl.atomic_add(count_ptr + at, total, mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=_ANY)
def _count_chosen_kernel(
    score_ptr, first_ptr, last_ptr, count_ptr, state_ptr, chunk_ptr,
    stride_row, num_keys, top_k, num_chunks, chunk_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the scores of a chunk that are above the threshold, and that are equal to it."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    first, end, wanted = _seen(first_ptr, last_ptr, row, num_keys, top_k)
    threshold, _left = _narrow(count_ptr, state_ptr, row, wanted, chunk == 0, 4)
    begin = chunk * chunk_blocks * BLOCK
    stop = tl.minimum(begin + chunk_blocks * BLOCK, end)
    begin += tl.maximum(first - begin, 0) // BLOCK * BLOCK
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n >= first) & (n < stop)
        score = _load(score_ptr, row * stride_row + n, ok)
        above += (ok & (score > threshold)).to(tl.int32)
        equal += (ok & (score == threshold)).to(tl.int32)
    at = chunk_ptr + (row * num_chunks + chunk) * 2
    tl.store(at, tl.sum(above, 0))
    tl.store(at + 1, tl.sum(equal, 0))


@triton.jit(do_not_specialize=_ANY)
def _write_chosen_kernel(
    score_ptr, first_ptr, last_ptr, state_ptr, chunk_ptr, index_ptr, chosen_ptr,
    stride_row, num_keys, top_k, num_chunks, chunk_blocks,
    BLOCK: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the chosen keys of a chunk behind those of the chunks before it."""
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    first, end, wanted = _seen(first_ptr, last_ptr, row, num_keys, top_k)
    threshold = tl.load(state_ptr + (row * 4 + 3) * 2).to(tl.uint32, bitcast=True)
    left = tl.load(state_ptr + (row * 4 + 3) * 2 + 1)
    chunks = tl.arange(0, MAX_CHUNKS)
    at = chunk_ptr + (row * num_chunks + chunks) * 2
    above = tl.load(at, mask=chunks < num_chunks, other=0)
    equal = tl.load(at + 1, mask=chunks < num_chunks, other=0)
    # Of the equal ones the later keys are wanted.
    skipped = tl.sum(equal, 0) - left
    num_above = tl.sum(tl.where(chunks < chunk, above, 0), 0)
    num_equal = tl.sum(tl.where(chunks < chunk, equal, 0), 0)
    out_ptr = index_ptr + row * top_k
    begin = chunk * chunk_blocks * BLOCK
    stop = tl.minimum(begin + chunk_blocks * BLOCK, end)
    begin += tl.maximum(first - begin, 0) // BLOCK * BLOCK
    holds_none = tl.sum(tl.where(chunks == chunk, above + equal, 0), 0) == 0
    if holds_none:
        stop = begin
    for start in range(begin, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        ok = (n >= first) & (n < stop)
        score = _load(score_ptr, row * stride_row + n, ok)
        is_above = (ok & (score > threshold)).to(tl.int32)
        is_equal = (ok & (score == threshold)).to(tl.int32)
        above_before = num_above + tl.cumsum(is_above, 0) - is_above
        equal_before = num_equal + tl.cumsum(is_equal, 0) - is_equal
        taken = (is_above > 0) | ((is_equal > 0) & (equal_before >= skipped))
        place = above_before + tl.maximum(equal_before - skipped, 0)
        tl.store(out_ptr + place, n.to(tl.int64), mask=taken)
        num_above += tl.sum(is_above, 0)
        num_equal += tl.sum(is_equal, 0)
    if chunk == 0:
        tl.store(chosen_ptr + row, wanted.to(tl.int64))
        # Behind fewer than `top_k` keys, which are all that the query sees, the first is repeated.
        repeated = tl.where(wanted > 0, first, 0)
        for start in range(wanted, top_k, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + place, repeated.to(tl.int64), mask=place < top_k)


_launches = Launches()


def index_choice(
    scores_BTS: Tensor, first_BT: Tensor, last_BT: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of the highest score of each query -> (places (B, T, K), how many (B, T)),
    both int64, with K = min(top_k, S).

    Places are in ascending order. Behind as many as a query sees the first is repeated, or 0 where
    it sees none.

    Args:
        scores_BTS: float32.
        first_BT, last_BT: int32, the places of the first and the last key that a query sees.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    if is_eager(scores_BTS, first_BT, last_BT):
        return _compute(scores_BTS, first_BT, last_BT, top_k)
    chosen: tuple[Tensor, Tensor] = _index_choice_op(scores_BTS, first_BT, last_BT, top_k)
    return chosen


@torch.library.custom_op("ic::index_choice", mutates_args=())
def _index_choice_op(
    scores: Tensor, first: Tensor, last: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    return _compute(scores, first, last, top_k)


@_index_choice_op.register_fake
def _(scores: Tensor, first: Tensor, last: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    width = min(top_k, scores.shape[2])
    return (
        scores.new_empty(*scores.shape[:2], width, dtype=torch.int64),
        scores.new_empty(scores.shape[:2], dtype=torch.int64),
    )


def _compute(scores: Tensor, first: Tensor, last: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    _check(scores, first, last, top_k)
    batch, queries, keys = scores.shape
    rows, width, device = batch * queries, min(top_k, keys), scores.device
    index = torch.empty(batch, queries, width, dtype=torch.int64, device=device)
    chosen = torch.empty(batch, queries, dtype=torch.int64, device=device)
    if not index.numel():
        return index, chosen.zero_()
    scores_MS = scores.reshape(rows, keys)
    if (keys > 1 and scores_MS.stride(1) != 1) or scores_MS.stride(0) >= 2**31:
        scores_MS = scores_MS.contiguous()
    first, last = first.contiguous(), last.contiguous()
    num_chunks, chunk_blocks = chunks_of(rows, keys)
    counts = torch.zeros(rows, _DIGITS, 256, dtype=torch.int32, device=device)
    state = torch.empty(rows, _DIGITS, 2, dtype=torch.int32, device=device)
    chunks = torch.empty(rows, num_chunks, 2, dtype=torch.int32, device=device)
    given = scores_MS, first, last
    stride = scores_MS.stride(0) if rows > 1 else 0
    numbers = stride, keys, width, num_chunks, chunk_blocks
    launches = _launches.get(scores.get_device())
    if launches is None:
        launches = _launches[scores.get_device()] = _prepare()
    grid = (rows * num_chunks, 1, 1)
    for launch in launches[:_DIGITS]:
        launch(grid, (*given, counts, state), numbers)
    launches[-2](grid, (*given, counts, state, chunks), numbers)
    launches[-1](grid, (*given, state, chunks, index, chosen), numbers)
    return index, chosen


def _prepare() -> tuple[Launch, ...]:
    """The six launches, in order."""
    block = {"BLOCK": BLOCK}
    counting = (
        Launch(_count_digits_kernel, {"DIGITS": digits} | block, num_warps=WARPS)
        for digits in range(_DIGITS)
    )
    return (
        *counting,
        Launch(_count_chosen_kernel, block, num_warps=WARPS),
        Launch(_write_chosen_kernel, block | {"MAX_CHUNKS": MAX_CHUNKS}, num_warps=WARPS),
    )


def chunks_of(rows: int, keys: int) -> tuple[int, int]:
    """(chunks of a row, blocks of a chunk): enough programs to fill a GPU, if there is so much."""
    blocks = triton.cdiv(keys, BLOCK)
    chunk_blocks = triton.cdiv(blocks, min(MAX_CHUNKS, max(_PROGRAMS // rows, 1)))
    return triton.cdiv(blocks, chunk_blocks), chunk_blocks


def _check(scores: Tensor, first: Tensor, last: Tensor, top_k: int) -> None:
    require(
        scores.dim() == 3 and scores.dtype == torch.float32 and scores.shape[2] <= _MAX_KEYS,
        f"scores is {scores.dtype} {tuple(scores.shape)}; want float32 (B, T, S), S at most "
        f"{_MAX_KEYS}",
    )
    for name, x in (("first", first), ("last", last)):
        require(
            x.shape == scores.shape[:2] and x.dtype == torch.int32,
            f"{name} is {x.dtype} {tuple(x.shape)}; want int32 {tuple(scores.shape[:2])}",
        )
    require(top_k >= 1, f"top_k is {top_k}; want at least 1")
    check_devices({"scores": scores, "first": first, "last": last})
