"""Sparse attention in one forward pass: what the indexers chose, and their losses.

The layers of a group share the indexer of the first: it keeps its keys and chooses, and the others
attend to the same tokens (docs/sparse_attention.md).

Legend: B batch, T new tokens, S visible tokens, D hidden, L the query's input, H heads, N qk_nope,
P qk_rope, V v_head, R kv_lora_rank, C = R + P, I index head dim, K chosen keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ic.model.cache import LatentLayer
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.index_loss import dense_index_loss, sparse_index_loss
from ic.model.indexer import IndexInputs
from ic.model.paged_cache import PagedLatentLayer, gather_pages
from ic.model.quantised_latents import dequantise
from ic.model.selection import Selection, VisibleKeys
from ic.model.sparse_operators import SparseOperators, pieces
from ic.model.static_cache import StaticLatentLayer


@dataclass(frozen=True)
class _Chosen:
    """What a group's indexer made of a pass.

    Attributes:
        new: queries, weights and keys of the new tokens.
        visible: keys that each of them sees.
        selection: None where attention is dense.
    """

    new: IndexInputs
    visible: VisibleKeys
    selection: Selection | None


class Indexing:
    """Of one forward pass.

    Args:
        is_sparse: attend to what the indexers choose; else to all.
        has_losses: compute the indexers' losses, in a pass without a cache.
    """

    def __init__(
        self, config: MLAConfig, operators: SparseOperators, *, is_sparse: bool, has_losses: bool
    ) -> None:
        self.config, self.operators = config, operators
        self.is_sparse, self.has_losses = is_sparse, has_losses
        # By group and layer, because a layer is computed again where its activations are not kept.
        self._chosen: dict[int, _Chosen] = {}
        self._losses: dict[int, Tensor] = {}

    @property
    def loss(self) -> Tensor:
        """KL between attention's weights and the indexer's, mean over queries and layers."""
        return torch.stack(list(self._losses.values())).mean()

    @torch.compiler.disable
    def choose(
        self,
        attention: Any,
        hidden_BTD: Tensor,
        query_BTL: Tensor,
        context: AttentionContext,
        cache: Cache | None,
    ) -> None:
        """Of an `MLAAttention` that stands first in its group: append the index keys to the cache,
        and choose what the new tokens attend to. Of another nothing.

        Raises:
            ValueError: a cache without index keys, or what sparse attention does not know.
        """
        if attention.layer_idx % self.config.index_group_size:
            return
        self._check(context)
        indexer = attention.indexer
        new = indexer(hidden_BTD, query_BTL, context.cos_BTF, context.sin_BTF)
        assert context.visible_BT is not None
        in_texts = context.document_ids_BT is not None
        visible = VisibleKeys.of(context.visible_BT, context.mask_BTS, in_texts=in_texts)
        keys, scale = new.k_BTI, None
        if cache is not None:
            keys, scale = _append(new.k_BTI, indexer, cache, context)
        selection = None
        if self.is_sparse and self._num_keys(keys, context) > self.config.index_topk:
            selection = self._select(new, keys, scale, visible, context)
        self._chosen[indexer.group] = _Chosen(new, visible, selection)

    @torch.compiler.disable
    def attend(
        self,
        attention: Any,
        q_nope_BTHN: Tensor,
        q_rope_BTHP: Tensor,
        rows_BSC: Tensor,
        scale_BS: Tensor | None,
        context: AttentionContext,
    ) -> Tensor | None:
        """Attention (B, T, H, V) to what was chosen; None where it is dense.

        Args:
            rows_BSC: latents and rotated keys, side by side; all pages of a paged cache.
            scale_BS: of a quantised cache.
        """
        chosen = self._chosen[attention.layer_idx // self.config.index_group_size]
        halves = attention.absorbed_weights(q_nope_BTHN.dtype)
        if self.has_losses:
            if halves is None:
                raise ValueError(
                    f"kv_b_proj is a {type(attention.kv_b_proj).__name__} that may be more than a "
                    "matrix, and the indexer learns from attention's weights in absorbed form: "
                    "merge or remove what wraps it"
                )
            with torch.no_grad():
                q_latent_BTHR = torch.einsum("bthn,hnr->bthr", q_nope_BTHN, halves[0])
                q_BTHC = torch.cat((q_latent_BTHR, q_rope_BTHP.to(q_latent_BTHR.dtype)), dim=-1)
            self._losses[attention.layer_idx] = self._mean_loss(q_BTHC, rows_BSC.detach(), chosen)
        selection = chosen.selection
        if selection is None:
            return None
        if halves is None or context.recorder is not None:
            q_BTHK = torch.cat((q_nope_BTHN, q_rope_BTHP), dim=-1)
            return _masked(attention, q_BTHK, rows_BSC, scale_BS, selection, context)
        w_k_HNR, w_v_HVR = halves
        q_latent_BTHR = torch.einsum("bthn,hnr->bthr", q_nope_BTHN, w_k_HNR)
        rows_MC, row_scale_M, slot_BTK = _flat(rows_BSC, scale_BS, selection.index_BTK, context)
        out_BTHR = self.operators.attend_chosen(
            q_latent_BTHR,
            q_rope_BTHP,
            rows_MC,
            slot_BTK,
            selection.count_BT,
            scale=self.config.softmax_scale,
            row_scale_M=row_scale_M,
        )
        return torch.einsum("bthr,hvr->bthv", out_BTHR, w_v_HVR)

    def _mean_loss(self, q_BTHC: Tensor, rows_BSC: Tensor, chosen: _Chosen) -> Tensor:
        new, scale = chosen.new, self.config.softmax_scale
        given = (*new, q_BTHC, rows_BSC.to(q_BTHC.dtype))
        if chosen.selection is None:
            total = dense_index_loss(*given, chosen.visible, scale)
        else:
            total = sparse_index_loss(*given, chosen.selection, scale)
        return total / new.w_BTJ.shape[:2].numel()

    def _check(self, context: AttentionContext) -> None:
        if context.parallel is not None:
            raise ValueError(
                "the indexer does not go with strategy.context_parallel_size above 1: each rank "
                "holds a part of the keys; set it to 1, or model.indexer.mode=dense without the "
                "indexer's loss"
            )
        if context.branches is not None:
            raise ValueError(
                "the indexer does not go with branches, the rows of preference training: set "
                "model.indexer.mode=dense"
            )

    def _num_keys(self, keys: Tensor, context: AttentionContext) -> int:
        """Keys that a query may see at most, from shapes alone."""
        if context.num_keys is not None:
            return context.num_keys
        table = context.block_table_BN
        return keys.shape[1] * (1 if table is None else table.shape[1])

    @torch.no_grad()
    def _select(
        self,
        new: IndexInputs,
        keys: Tensor,
        scale: Tensor | None,
        visible: VisibleKeys,
        context: AttentionContext,
    ) -> Selection:
        batch, tokens = new.w_BTJ.shape[:2]
        table, top_k = context.block_table_BN, self.config.index_topk
        found = []
        for part in pieces(tokens, 4 * batch * self._num_keys(keys, context)):
            chosen = self.operators.choose_keys(
                new.q_BTJI[:, part],
                new.w_BTJ[:, part],
                keys,
                visible.piece(part),
                top_k,
                key_scale=scale,
                block_table_BN=table,
            )
            found.append(chosen)
        return Selection(
            torch.cat([x.index_BTK for x in found], dim=1),
            torch.cat([x.count_BT for x in found], dim=1),
        )


def _append(
    k_BTI: Tensor, indexer: Any, cache: Cache, context: AttentionContext
) -> tuple[Tensor, Tensor | None]:
    """Append index keys to a cache -> all that it holds of this indexer, (B, S, I), and the scales
    of quantised ones; of a paged cache all pages.
    """
    layer: Any = None
    if len(cache.layers) == indexer.cache_layers:
        layer = cache.layers[indexer.cache_place]
    nothing = k_BTI[..., :0]
    if isinstance(layer, PagedLatentLayer) or (
        isinstance(layer, LatentLayer) and layer.lengths is not None
    ):
        layer.append_rows(k_BTI, nothing, context.append_slots_M)
    elif isinstance(layer, LatentLayer | StaticLatentLayer):
        layer.append(k_BTI, nothing)
    else:
        raise ValueError(
            f"a {type(cache).__name__} of {len(cache.layers)} layers has no place for index keys: "
            "sparse attention takes a cache of model.new_cache or model.new_static_cache, made "
            "since the model is sparse; leave past_key_values out, or set indexer=dense"
        )
    keys, scale = layer.latents(), layer.scales()
    if context.num_keys is not None and context.block_table_BN is None:
        keys = keys[:, : context.num_keys]
        scale = None if scale is None else scale[:, : context.num_keys]
    return keys, scale


def _flat(
    rows_BSC: Tensor, scale_BS: Tensor | None, index_BTK: Tensor, context: AttentionContext
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tokens of all rows behind each other, (M, C), their scales, and where among them the
    chosen ones (B, T, K) are.
    """
    table = context.block_table_BN
    if table is None:
        rows_MC, step = _behind_each_other(rows_BSC)
        first_B11 = torch.arange(len(index_BTK), device=index_BTK.device)[:, None, None] * step
        slot_BTK = first_B11 + index_BTK
    else:
        rows_MC, page_tokens = rows_BSC.flatten(0, 1), rows_BSC.shape[1]
        page_BTK = (index_BTK // page_tokens).flatten(1)
        first = table.gather(1, page_BTK).view_as(index_BTK).long() * page_tokens
        slot_BTK = first + index_BTK % page_tokens
    row_scale_M = None if scale_BS is None else _behind_each_other(scale_BS[..., None])[0][:, 0]
    return rows_MC, row_scale_M, slot_BTK


def _behind_each_other(rows_BSC: Tensor) -> tuple[Tensor, int]:
    """Rows as one, and how far apart they begin. Rows of a longer buffer are not copied: the result
    then holds what is behind them too.
    """
    tokens, (outer, inner) = rows_BSC.shape[1], rows_BSC.stride()[:2]
    step = outer // max(inner, 1)
    held = rows_BSC.untyped_storage().nbytes() // rows_BSC.element_size()
    fits = rows_BSC.storage_offset() + len(rows_BSC) * outer <= held
    if rows_BSC.requires_grad or outer != step * inner or step < tokens or not fits:
        return rows_BSC.flatten(0, 1), tokens
    shape = (len(rows_BSC) * step, rows_BSC.shape[2])
    return rows_BSC.as_strided(shape, (inner, rows_BSC.stride(2))), step


def _masked(
    attention: Any,
    q_BTHK: Tensor,
    rows_BSC: Tensor,
    scale_BS: Tensor | None,
    selection: Selection,
    context: AttentionContext,
) -> Tensor:
    """Attention to what was chosen by a mask over all keys, where weights are recorded or
    `kv_b_proj` is more than a matrix.
    """
    if context.block_table_BN is not None:
        rows_BSC, scale_BS = gather_pages(
            rows_BSC, scale_BS, context.block_table_BN, context.visible_BT
        )
    if scale_BS is not None:
        rows_BSC = dequantise(rows_BSC, scale_BS, q_BTHK.dtype)
    keys, rank = rows_BSC.shape[1], attention.config.kv_lora_rank
    masked = replace(
        context,
        mask_BTS=selection.matrix(keys),
        segments=None,
        document_ids_BT=None,
        block_table_BN=None,
    )
    attended: Tensor = attention.expanded(
        q_BTHK, rows_BSC[..., :rank], rows_BSC[..., rank:], masked
    )
    return attended
