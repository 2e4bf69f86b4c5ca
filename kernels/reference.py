"""The kernels' specification in PyTorch: readable, in fp32, one line of maths at a time.

B sequences, Q query tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, S cached tokens, T new
tokens.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
INT8_MAX = 127.0


def gather_latent_cache(
    cache: torch.Tensor,
    length: int,
    sequence: int,
    block_table: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first `length` cached tokens of one sequence as fp32 (length, R + P), dequantised."""
    if block_table is None:
        rows = cache[sequence, :length].float()
        scale = None if cache_scale is None else cache_scale[sequence, :length]
    else:
        page_size = cache.shape[1]
        pages = block_table[sequence, : -(-length // page_size)].long()
        rows = cache[pages].flatten(0, 1)[:length].float()
        scale = None if cache_scale is None else cache_scale[pages].flatten()[:length]
    return rows if scale is None else rows * scale[:, None]


def mla_decode_reference(
    q_latent_BQHR: torch.Tensor,
    q_rope_BQHP: torch.Tensor,
    cache: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    softmax_scale: float,
    block_table: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA decode, as `ic.kernels.triton_mla_flash_decode.mla_decode`, in fp32.

    Query token t of Q sees the first length - Q + 1 + t tokens. Returns out (B, Q, H, R) and the
    natural log-sum-exp (B, Q, H), both fp32; a token that sees nothing gives 0 and -inf.
    """
    B, Q, H, R = q_latent_BQHR.shape
    out = q_latent_BQHR.new_zeros(B, Q, H, R, dtype=torch.float32)
    lse = torch.full_like(out[..., 0], float("-inf"))
    q_BQHC = torch.cat([q_latent_BQHR, q_rope_BQHP], dim=-1).float()
    for b, length in enumerate(seq_lens_B.tolist()):
        cache_SC = gather_latent_cache(cache, length, b, block_table, cache_scale)
        for t in range(Q):
            visible = length - Q + 1 + t
            if visible <= 0:
                continue
            scores_HS = softmax_scale * q_BQHC[b, t] @ cache_SC[:visible].T
            lse[b, t] = scores_HS.logsumexp(-1)
            out[b, t] = scores_HS.softmax(-1) @ cache_SC[:visible, :R]
    return out, lse


def quantize_per_token(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., C) to e4m3 or int8 with one fp32 scale a row: scale = max |x| / (448 or 127)."""
    largest = E4M3_MAX if dtype == torch.float8_e4m3fn else INT8_MAX
    scale = rows.float().abs().amax(-1).clamp_min(1e-12) / largest
    scaled = rows.float() / scale[..., None]
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), scale


def rotate_pairs(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate pairs of the last dimension in place: (2i, 2i+1) interleaved, or (i, i + P/2)."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def append_latent_reference(
    latent_TR: torch.Tensor,
    rope_key_TP: torch.Tensor,
    weight_R: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    cache_scale: torch.Tensor | None = None,
) -> None:
    """RMS-normalise the latent, rotate the shared key, write both: as `append_latent`.

    All in fp32 with one rounding to the cache's dtype. cos and sin are (T, P/2); slot -1 is
    skipped.
    """
    latent = latent_TR.float()
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps) * weight_R.float()
    rope_key = rotate_pairs(rope_key_TP.float(), cos_TF.float(), sin_TF.float(), interleaved)
    rows = torch.cat([latent, rope_key], dim=-1)
    kept = slot_mapping_T >= 0
    slots = slot_mapping_T[kept]
    page, place = slots // cache.shape[1], slots % cache.shape[1]
    if cache_scale is None:
        cache[page, place] = rows[kept].to(cache.dtype)
        return
    quantized, scale = quantize_per_token(rows[kept], cache.dtype)
    cache.view(torch.uint8)[page, place] = quantized.view(torch.uint8)
    cache_scale[page, place] = scale
