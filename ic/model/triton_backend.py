"""Attention of `MLAAttention` on our Triton kernels, imported only for that backend.

Legend: B batch, T new tokens, S visible tokens, H heads, K qk_head_dim, V v_head, R kv_lora_rank,
C = R + qk_rope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.kernels.triton_mla_attention import mla_attention
from ic.kernels.triton_mla_flash_decode import mla_decode

# The decode kernel takes one token, or a few speculated ones.
MAX_DECODE_QUERIES = 4


def expanded(
    q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, *, scale: float, document_ids_BT: Tensor | None
) -> Tensor:
    """Causal attention (B, T, H, V) of the last T of S positions, within documents if given."""
    ids = None if document_ids_BT is None else document_ids_BT.to(torch.int32).contiguous()
    return mla_attention(q_BTHK, k_BSHK, v_BSHV, scale=scale, document_ids=ids)


def absorbed(q_BTHC: Tensor, cache_BSC: Tensor, *, rank: int, scale: float) -> Tensor:
    """Attention of up to four absorbed queries over the latents, (B, T, H, R)."""
    lengths = torch.full(
        (len(cache_BSC),), cache_BSC.shape[1], dtype=torch.int32, device=cache_BSC.device
    )
    out_BTHR, _ = mla_decode(
        q_BTHC[..., :rank], q_BTHC[..., rank:], cache_BSC, lengths,
        softmax_scale=scale, check_indices=False,  # the lengths were made here
    )  # fmt: skip
    return out_BTHR
