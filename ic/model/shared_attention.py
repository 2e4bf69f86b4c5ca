"""MLA where context-parallel ranks share each sequence (`ic.parallel.context_parallel`).

Legend as in `ic.model.attention`; T new tokens of this rank, S visible tokens of the sequence or,
while decoding, of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ic.model.adapter import effective_weight

if TYPE_CHECKING:
    from ic.model.attention import MLAAttention
    from ic.model.context import AttentionContext
    from ic.parallel.context_parallel import ContextParallel


def shared_attention(
    attention: MLAAttention,
    q_BTHK: Tensor,
    latent_BTR: Tensor,
    k_rope_BTP: Tensor,
    context: AttentionContext,
    parallel: ContextParallel,
    cache: Cache | None,
) -> Tensor:
    """Attention (B, T, H, V) of this rank's queries to the keys of all ranks; collective.

    Split tokens (training, prefill) gather the sequence's latents and expand them. Tokens that
    every rank has (decoding) attend to this rank's part of the cache in the absorbed form; the
    parts are merged by their log-sum-exp.
    """
    layer: Any = None if cache is None else cache.layers[attention.layer_idx]
    if not context.is_split:
        layer.append_replicated(latent_BTR[:, None], k_rope_BTP[:, None])
        return _decode(attention, q_BTHK, layer.latents(), parallel, layer.holds_replicated)
    rank = attention.config.kv_lora_rank
    own_BTC = torch.cat((latent_BTR, k_rope_BTP.to(latent_BTR.dtype)), dim=-1)
    keys_BSC = parallel.gather(own_BTC)
    num_new = keys_BSC.shape[1]
    if layer is not None:
        if layer.total:
            # Every query sees all of the past, so its order does not matter.
            past_BSC = parallel.gather_unordered(layer.latents())
            keys_BSC = torch.cat((past_BSC, keys_BSC), dim=1)
        layer.append_split(latent_BTR[:, None], k_rope_BTP[:, None], num_new)
    past = keys_BSC.shape[1] - num_new
    pieces = []
    for chunk in parallel.chunks(num_new):
        # Each chunk expands its own keys: a view of longer ones would fill a tensor of their length
        # with its gradient.
        visible_BSC = keys_BSC[:, : past + chunk.end]
        pieces.append(
            attention.expanded(
                q_BTHK[:, chunk.own],
                visible_BSC[..., :rank],
                visible_BSC[..., rank:],
                context.up_to(past + chunk.end),
            )
        )
    return torch.cat(pieces, dim=1)


def _decode(
    attention: MLAAttention,
    q_BTHK: Tensor,
    cache_BSC: Tensor,
    parallel: ContextParallel,
    holds_new: bool,
) -> Tensor:
    """Without `holds_new` this rank's keys are all older than the queries."""
    config = attention.config
    weight_XR = effective_weight(attention.kv_b_proj).to(q_BTHK.dtype)
    weight_HXR = weight_XR.view(config.num_attention_heads, -1, config.kv_lora_rank)
    w_k_HNR, w_v_HVR = weight_HXR.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    q_nope, q_rope = q_BTHK.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
    q_BTHC = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_k_HNR), q_rope), dim=-1)
    scores_BTHS = torch.einsum("bthc,bsc->bths", q_BTHC, cache_BSC).float() * config.softmax_scale
    tokens, keys = q_BTHK.shape[1], cache_BSC.shape[1]
    if holds_new and tokens > 1:
        index = torch.arange(keys, device=q_BTHK.device)
        hidden = index > index[keys - tokens :, None]
        scores_BTHS = scores_BTHS.masked_fill(hidden[:, None], -torch.inf)
    latent_BSR = cache_BSC[..., : config.kv_lora_rank]
    own_BTHR = torch.einsum("bths,bsr->bthr", scores_BTHS.softmax(-1).to(latent_BSR), latent_BSR)
    out_BTHR = parallel.merge(own_BTHR, scores_BTHS.logsumexp(-1))
    return torch.einsum("bthr,hvr->bthv", out_BTHR, w_v_HVR)
