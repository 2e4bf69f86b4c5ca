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
load. Where R and P are powers of two (512 and 64), latent and rope key are two tiles. Of any other
widths (48+32, 8+16) one tile is as wide as the next power of two, and its columns from R + P on are
masked: nothing is read for them. With few rows (SWAP) the tile is the left
operand, S^T = C Q^T and O^T = C^T P^T, so a Hopper warpgroup multiplies 64 tokens by 16 heads with
nothing wasted on padding.

A quantised cache (e4m3 or int8, one fp32 scale a token) is widened to fp16 in registers. The scale
d of a token enters as s_j + log2(d): the probability that multiplies the widened row is then at
most 1 whatever the scales are, and the sum of probabilities divides by d again. fp16 probabilities
are shifted by 2^14, so that the many small ones of a long context are not lost to fp16's range.
On Hopper `gluon_mla_decode_e4m3` takes e4m3 caches and few rows instead, without widening the keys,
and `gluon_mla_decode_codes` more than 16 rows of 512+64, with warps that do nothing but widen.

Memory traffic. B*S*(R+P)*itemsize (+ 4 bytes a token of scale) once for every BLOCK_M rows, which
share it through L2; partial results cost 4*(R+1) bytes a row and split, written and read once.

Limits. R and P multiples of 8, R from 8 to 512; R + P at most 512, or both powers of two. At most 4
query tokens. Page size a multiple of 16, or 1: a table of tokens. Offsets are int64: a cache may
hold more than 2^31 elements. A page number outside the cache is clamped in the kernel, so it can
never cause an illegal access; `check_indices=True` reports it. Rows past a sequence's end are never
read, whatever they hold.

Source. FlashDecoding's split and combine (Dao et al., 2023); the absorbed form is DeepSeek-V2's
(arXiv 2405.04434, 2.1); the 64-row tile with 8 warps is FlashMLA's.
"""

from __future__ import annotations

import torch

from ic.kernels.launch import is_eager, needs_gradient
from ic.kernels.mla_decode_checks import check_decode_arguments, check_decode_indices
from ic.kernels.mla_decode_plan import empty_outputs, find_plan


@torch.library.custom_op("ic::mla_decode", mutates_args=())
def _mla_decode_op(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_scale: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int | None = None,
    max_context_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = q_latent, q_rope, cache, seq_lens, block_table, cache_scale
    return find_plan(*tensors).run(*tensors, softmax_scale, num_splits, max_context_tokens)


@_mla_decode_op.register_fake
def _(q_latent: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q_latent)


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
    tensors = q_latent_BQHR, q_rope_BQHP, cache, seq_lens_B, block_table, cache_scale
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits is {num_splits}; it must be at least 1")
    if check_indices:
        check_decode_arguments(*tensors)
        check_decode_indices(cache, seq_lens_B, block_table)
    choice = float(softmax_scale), num_splits, max_context_tokens
    if is_eager(*tensors) and not needs_gradient(q_latent_BQHR, q_rope_BQHP, cache):
        return find_plan(*tensors).run(*tensors, *choice)
    return _mla_decode_op(*tensors, *choice)
