"""The kernels' specification in PyTorch: readable, in fp32, one line of maths at a time.

B sequences, Q query tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, S cached tokens, T new
tokens. The training references accumulate in fp32, or in fp64 when their inputs are fp64.
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


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def document_bounds(document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First position and one past the last position of each position's document, (B, S) int32.

    A document is a maximal run of equal ids: an id that comes back later starts a new document.
    """
    num_positions = document_ids.shape[1]
    position = torch.arange(num_positions, device=document_ids.device, dtype=torch.int32)
    position = position.expand_as(document_ids)
    new = torch.ones_like(document_ids, dtype=torch.bool)
    new[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(new, position, 0).cummax(1).values
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    end = torch.where(last, position + 1, num_positions).flip(1).cummin(1).values.flip(1)
    return start.int().contiguous(), end.int().contiguous()


def attention_reference(
    q_BTHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHV: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within documents; returns out (B, T, H, V) and log-sum-exp (B, H, T).

    The queries are the last T of the S positions; document_ids is (B, S).
    """
    num_queries, num_keys = q_BTHD.shape[1], k_BSHD.shape[1]
    query = torch.arange(num_keys - num_queries, num_keys, device=q_BTHD.device)
    key = torch.arange(num_keys, device=q_BTHD.device)
    visible = (key[None, :] <= query[:, None])[None]
    if document_ids is not None:
        start = document_bounds(document_ids)[0][:, num_keys - num_queries :]
        visible = visible & (key[None, None, :] >= start[:, :, None])
    score = torch.einsum("bthd,bshd->bhts", _wide(q_BTHD), _wide(k_BSHD)) * scale
    score = score.masked_fill(~visible[:, None], float("-inf"))
    out = torch.einsum("bhts,bshv->bthv", score.softmax(-1), _wide(v_BSHV))
    return out.to(q_BTHD.dtype), score.logsumexp(-1)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed rows, and what was normed: x, or x + residual rounded to the dtype of x."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * _wide(weight)).to(x.dtype), total


def rope_reference(
    x_BTHP: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Rotate pairs (2i, 2i+1) when interleaved (DeepSeek's view_as_complex), else (i, i + P/2).

    cos and sin are (B or 1, T, P/2); the result keeps the layout of the input.
    """
    wide = _wide(x_BTHP)
    c, s = cos.to(wide.dtype)[:, :, None, :], sin.to(wide.dtype)[:, :, None, :]
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        out = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = wide.chunk(2, dim=-1)
        out = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return out.to(x_BTHP.dtype)
