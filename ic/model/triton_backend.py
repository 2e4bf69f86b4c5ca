"""The model's attention, norm, rotation and append on our Triton kernels, imported only for them.

Legend: B batch, T new tokens, S visible tokens, H heads, K qk_head_dim, V v_head, R kv_lora_rank,
C = R + qk_rope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_mla_attention import mla_attention
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.kernels.triton_rmsnorm import add_rms_norm, rms_norm
from ic.kernels.triton_rope import apply_rope

__all__ = [
    "MAX_DECODE_QUERIES",
    "absorbed",
    "add_rms_norm",
    "append_latent",
    "apply_rope",
    "expanded",
    "rms_norm",
]

# The decode kernel takes one token, or a few speculated ones.
MAX_DECODE_QUERIES = 4


def expanded(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, *, scale: float, document_ids_BT: Tensor | None
) -> Tensor:
    """Causal attention (B, T, H, V) of the last T of S positions, within documents if given."""
    ids = None if document_ids_BT is None else document_ids_BT.to(torch.int32).contiguous()
    return mla_attention(q_BTHK, k_BSHK, v_BSHV, scale=scale, document_ids=ids)


def absorbed(
    q_latent_BTHR: Tensor,
    q_rope_BTHP: Tensor,
    cache_BSC: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attention of up to four absorbed queries over the latents, (B, T, H, R)."""
    out_BTHR, _ = mla_decode(
        q_latent_BTHR,
        q_rope_BTHP,
        cache_BSC,
        lengths_B,
        softmax_scale=scale,
        check_indices=False,  # MLAModel made the lengths; no wait for them
    )
    return out_BTHR
