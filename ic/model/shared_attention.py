"""MLA where ranks share each sequence (`ic.model.sharing`).

Legend as in `ic.model.attention`; T new tokens of this rank, S visible tokens of the sequence or,
while decoding, of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ic.model.context import AttentionContext
from ic.model.sharing import SequenceSharing, SharedLayer

# Queries, latents and rotated keys -> attention of the last T of S positions.
Expand = Callable[[Tensor, Tensor, Tensor, AttentionContext], Tensor]


def split_attention(
    expand: Expand,
    q_BTHK: Tensor,
    latent_BTR: Tensor,
    k_rope_BTP: Tensor,
    context: AttentionContext,
    parallel: SequenceSharing,
    layer: SharedLayer | None,
) -> Tensor:
    """Attention (B, T, H, V) of this rank's tokens to those of all ranks; collective.

    In training and prefill: gathers the sequence's latents and expands them.

    Args:
        layer: the cache of this layer, which is extended, or None.
    """
    rank = latent_BTR.shape[-1]
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
            expand(
                q_BTHK[:, chunk.own],
                visible_BSC[..., :rank],
                visible_BSC[..., rank:],
                context.up_to(past + chunk.end),
            )
        )
    return torch.cat(pieces, dim=1)


def replicated_attention(
    q_BTHC: Tensor,
    latent_BTR: Tensor,
    k_rope_BTP: Tensor,
    parallel: SequenceSharing,
    layer: SharedLayer,
    *,
    scale: float,
) -> Tensor:
    """Absorbed attention (B, T, H, R) of tokens that every rank has; collective.

    Each rank attends to its part of the cache, on PyTorch's operators whatever the backend; the
    parts are merged by their log-sum-exp.
    """
    layer.append_replicated(latent_BTR[:, None], k_rope_BTP[:, None])
    cache_BSC = layer.latents()
    scores_BTHS = torch.einsum("bthc,bsc->bths", q_BTHC, cache_BSC).float() * scale
    tokens, keys = q_BTHC.shape[1], cache_BSC.shape[1]
    # A rank that does not keep the new tokens has only keys that are older than the queries.
    if layer.holds_replicated and tokens > 1:
        index = torch.arange(keys, device=q_BTHC.device)
        hidden = index > index[keys - tokens :, None]
        scores_BTHS = scores_BTHS.masked_fill(hidden[:, None], -torch.inf)
    latent_BSR = cache_BSC[..., : latent_BTR.shape[-1]]
    own_BTHR = torch.einsum("bths,bsr->bthr", scores_BTHS.softmax(-1).to(latent_BSR), latent_BSR)
    return parallel.merge(own_BTHR, scores_BTHS.logsumexp(-1))


def shared_attention(
    attention: Any,
    q_nope_BTHN: Tensor,
    q_rope_BTHP: Tensor,
    latent_BTR: Tensor,
    k_rope_BTP: Tensor,
    context: AttentionContext,
    cache: Cache | None,
) -> Tensor:
    """Attention (B, T, H, V) of an `MLAAttention` where ranks share each sequence; collective.

    Raises:
        ValueError: its `kv_b_proj` may be more than a matrix.
    """
    parallel = context.parallel
    assert parallel is not None
    layer: Any = None if cache is None else cache.layers[attention.layer_idx]
    if context.is_split:
        q_BTHK = torch.cat((q_nope_BTHN, q_rope_BTHP), dim=-1)
        return split_attention(
            attention.expanded, q_BTHK, latent_BTR, k_rope_BTP, context, parallel, layer
        )
    halves = attention.absorbed_weights(q_nope_BTHN.dtype)
    if halves is None:
        raise ValueError(
            f"kv_b_proj is a {type(attention.kv_b_proj).__name__} that may be more than a matrix, "
            "and a sequence that ranks share is decoded through its matrix: merge or remove "
            "what wraps it, or decode on one rank"
        )
    w_k_HNR, w_v_HVR = halves
    q_latent_BTHR = torch.einsum("bthn,hnr->bthr", q_nope_BTHN, w_k_HNR)
    out_BTHR = replicated_attention(
        torch.cat((q_latent_BTHR, q_rope_BTHP), dim=-1),
        latent_BTR,
        k_rope_BTP,
        parallel,
        layer,
        scale=attention.config.softmax_scale,
    )
    return torch.einsum("bthr,hvr->bthv", out_BTHR, w_v_HVR)
