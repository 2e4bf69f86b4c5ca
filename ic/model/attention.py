"""Multi-head Latent Attention in two forms with the same weights and the same result.

Expanded (training, prefill): keys and values of every head are made from the latents. Absorbed
(decode): the two halves of `kv_b_proj` are moved to the query and the output, so that all heads
attend to the latents themselves (arXiv 2405.04434, section 2.1.2; DeepSeek-V3
`inference/model.py`).

Legend: B batch, T new tokens, S visible tokens, D hidden, H heads, N qk_nope, P qk_rope,
K = N + P, V v_head, R kv_lora_rank, C = R + P.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ic.model.branches import branched_attention
from ic.model.cache import LatentLayer
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.indexer import Indexer
from ic.model.length_temperature import LengthTemperature
from ic.model.norm import MLARMSNorm
from ic.model.operators import NewQueries, NewTokens, Operators
from ic.model.paged_cache import PagedLatentLayer, gather_pages
from ic.model.plain_layers import is_bare, matrix_of, plain_weight
from ic.model.qk_norm import KeyNorm, QueryNorm
from ic.model.quantised_latents import dequantise
from ic.model.shared_attention import shared_attention
from ic.model.static_cache import StaticLatentLayer

# Keys and values of all heads of 1M tokens would take more memory than the whole cache.
EXPANDED_BYTES = 2**31


class MLAAttention(nn.Module):
    """MLA with DeepSeek's weight names."""

    def __init__(self, config: MLAConfig, layer_idx: int, operators: Operators) -> None:
        super().__init__()
        self.config = config
        self.operators = operators
        self.layer_idx = layer_idx
        self.rotate = layer_idx not in (config.nope_layers or [])
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=config.query_bias)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = MLARMSNorm(config.q_lora_rank, operators=operators.norm)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=bias)
        self.kv_a_layernorm = (
            MLARMSNorm(config.kv_lora_rank, operators=operators.norm)
            if config.latent_norm
            else nn.Identity()
        )
        if config.qk_norm_dim is not None:
            self.q_norm = QueryNorm(config, operators.norm)
            self.k_norm = KeyNorm(config, operators.norm)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)
        self.o_proj.is_residual_output = True  # type: ignore[assignment]  # read by init_weights
        if config.length_temperature != "none":
            self.length_temperature = LengthTemperature(config)
        if config.indexer != "off" and layer_idx % config.index_group_size == 0:
            self.indexer = Indexer(config, layer_idx)

    def forward(
        self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); with a cache, appends T latents and attends to all of it."""
        if self.config.q_lora_rank is None:
            query_BTL, project = hidden_BTD, self.q_proj
        else:
            query_BTL, project = self.q_a_layernorm(self.q_a_proj(hidden_BTD)), self.q_b_proj
        q_BTX = project(query_BTL)
        if context.indexing is not None:
            context.indexing.choose(self, hidden_BTD, query_BTL, context, cache)
        kv_BTC = self.kv_a_proj_with_mqa(hidden_BTD)
        return self.o_proj(self.attend(q_BTX, kv_BTC, context, cache).flatten(2))

    def attend(
        self,
        q_BTX: Tensor,
        kv_BTC: Tensor,
        context: AttentionContext,
        cache: Cache | None = None,
        *,
        is_fused: bool = False,
    ) -> Tensor:
        """What stands between the projections: (B, T, H, V).

        Args:
            q_BTX: queries of all heads, (B, T, H K), which may be written where nothing needs
                their gradient.
            kv_BTC: latents and shared keys, (B, T, C), neither normalised nor rotated.
            is_fused: one kernel may scale and rotate the queries and append.
        """
        config = self.config
        queries = self._queries_along(q_BTX, context, cache) if is_fused else None
        if queries is None:
            q_nope_BTHN, q_rope_BTHP = self._query(q_BTX, context)
        else:
            q_nope_BTHN, q_rope_BTHP = self._parts(q_BTX)
        latent_BTR, unrotated_BTP = kv_BTC.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        if config.qk_norm_dim is not None:
            unrotated_BTP = self.k_norm(unrotated_BTP)
        k_rope_BTP = unrotated_BTP
        if self.rotate and queries is None:
            q_rope_BTHP, k_rope_BT1P = self.operators.rope.rotate(
                q_rope_BTHP,
                unrotated_BTP[:, :, None],
                context.cos_BTF,
                context.sin_BTF,
                interleave=config.rope_interleave,
            )
            k_rope_BTP = k_rope_BT1P[:, :, 0]
        if context.parallel is not None:
            latent_BTR = self.kv_a_layernorm(latent_BTR)
            return shared_attention(
                self, q_nope_BTHN, q_rope_BTHP, latent_BTR, k_rope_BTP, context, cache
            )
        indexing = context.indexing
        if cache is None:
            latent_BTR = self.kv_a_layernorm(latent_BTR)
            if indexing is not None:
                rows_BTC = torch.cat((latent_BTR, k_rope_BTP.to(latent_BTR.dtype)), dim=-1)
                chosen = indexing.attend(self, q_nope_BTHN, q_rope_BTHP, rows_BTC, None, context)
                if chosen is not None:
                    return chosen
            q_BTHK = torch.cat((q_nope_BTHN, q_rope_BTHP), dim=-1)
            return self.expanded(q_BTHK, latent_BTR, k_rope_BTP, context)
        cache_BSC, scale_BS = self._append(
            latent_BTR, unrotated_BTP, k_rope_BTP, cache, context, queries
        )
        if indexing is not None:
            chosen = indexing.attend(self, q_nope_BTHN, q_rope_BTHP, cache_BSC, scale_BS, context)
            if chosen is not None:
                return chosen
        if context.block_table_BN is not None:
            halves = self.absorbed_weights(q_nope_BTHN.dtype) if context.reads_pages else None
            if halves is not None:
                return self._absorbed(
                    q_nope_BTHN, q_rope_BTHP, cache_BSC, scale_BS, context, *halves
                )
            cache_BSC, scale_BS = gather_pages(
                cache_BSC,
                scale_BS,
                context.block_table_BN,
                context.visible_BT if context.num_keys is None else None,
            )
            context = replace(context, block_table_BN=None)
        if context.num_keys is not None:
            cache_BSC = cache_BSC[:, : context.num_keys]
            scale_BS = None if scale_BS is None else scale_BS[:, : context.num_keys]
        is_plain = context.document_ids_BT is None and context.branches is None
        is_recorded = context.recorder is not None
        if is_plain and (is_recorded or q_BTX.shape[1] <= config.absorbed_max_queries):
            halves = None if is_recorded else self.absorbed_weights(q_nope_BTHN.dtype)
            if halves is not None:
                return self._absorbed(
                    q_nope_BTHN, q_rope_BTHP, cache_BSC, scale_BS, context, *halves
                )
            context = context.masked(cache_BSC.shape[1])
        if scale_BS is not None:
            cache_BSC = dequantise(cache_BSC, scale_BS, q_nope_BTHN.dtype)
        q_BTHK = torch.cat((q_nope_BTHN, q_rope_BTHP), dim=-1)
        latent_BSR, k_rope_BSP = cache_BSC.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        return self.expanded(q_BTHK, latent_BSR, k_rope_BSP, context)

    def _query(self, q_BTX: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The two parts of the query, views of one tensor, not rotated."""
        config = self.config
        q_BTHK = q_BTX.unflatten(-1, (-1, config.qk_head_dim))
        parts = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        if config.qk_norm_dim is not None:
            q_nope, q_rope = q_BTHK.split(parts, -1)
            q_BTHK = torch.cat((q_nope, self.q_norm(q_rope)), dim=-1)
        if config.length_temperature != "none":
            assert context.visible_BT is not None
            factor = self.length_temperature(context.visible_BT)
            # In place saves decode a launch and prefill a float32 copy of the query.
            in_place = not torch.is_grad_enabled()
            q_BTHK = q_BTHK.mul_(factor) if in_place else (q_BTHK * factor).to(q_BTHK.dtype)
        q_nope, q_rope = q_BTHK.split(parts, -1)
        return q_nope, q_rope

    def _parts(self, q_BTX: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        q_nope, q_rope = q_BTX.unflatten(-1, (-1, config.qk_head_dim)).split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], -1
        )
        return q_nope, q_rope

    def _queries_along(
        self, q_BTX: Tensor, context: AttentionContext, cache: Cache | None
    ) -> NewQueries | None:
        """The queries for the kernel that appends; None if they go their own way."""
        config = self.config
        batch, tokens = q_BTX.shape[:2]
        temperature = getattr(self, "length_temperature", None)
        if (
            cache is None
            or self.operators.append is None
            or context.parallel is not None
            or config.qk_norm_dim is not None
            or not (temperature is None or is_bare(temperature, LengthTemperature))
            or not self._appends_at_once(self._layer_of(cache), tokens, context)
        ):
            return None
        q_MHK = q_BTX.flatten(0, 1).unflatten(-1, (-1, config.qk_head_dim))
        if temperature is None:
            return NewQueries(q_MHK, "none", None, None, 0.0, 1)
        assert context.visible_BT is not None
        visible_M = context.visible_BT.expand(batch, tokens).flatten()
        scale_H = temperature.scale if temperature.kind == "ssmax" else None
        return NewQueries(
            q_MHK, temperature.kind, scale_H, visible_M, temperature.beta, temperature.original
        )

    def _append(
        self,
        latent_BTR: Tensor,
        unrotated_BTP: Tensor,
        k_rope_BTP: Tensor,
        cache: Cache,
        context: AttentionContext,
        queries: NewQueries | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Append the new tokens to the cache: normalised latents and rotated shared keys.

        Returns:
            all that this layer of the cache then holds, (B, S, C), and the scales (B, S) of a
            quantised one; of a paged cache all its pages.
        """
        layer = self._layer_of(cache)
        append = self.operators.append
        norm: Any = self.kv_a_layernorm
        batch, tokens = latent_BTR.shape[:2]
        if append is not None and self._appends_at_once(layer, tokens, context):
            assert context.append_slots_M is not None
            cos_MF, sin_MF = (
                x.expand(batch, tokens, -1).flatten(0, 1)
                for x in (context.cos_BTF, context.sin_BTF)
            )
            new = NewTokens(
                latent_BTR.flatten(0, 1),
                unrotated_BTP.flatten(0, 1),
                cos_MF,
                sin_MF,
                context.append_slots_M,
            )
            pages, scale = layer.extend(tokens)
            append.append(
                new,
                norm.weight,
                pages,
                eps=norm.eps,
                interleave=self.config.rope_interleave,
                cache_scale=scale,
                queries=queries,
            )
        elif isinstance(layer, PagedLatentLayer) or (
            isinstance(layer, LatentLayer) and layer.lengths is not None
        ):
            layer.append_rows(norm(latent_BTR), k_rope_BTP, context.append_slots_M)
        elif isinstance(layer, LatentLayer | StaticLatentLayer):
            layer.append(norm(latent_BTR), k_rope_BTP)
        else:
            new_B1TR, new_B1TP = norm(latent_BTR)[:, None], k_rope_BTP[:, None]
            keys_B1SR, values_B1SP = cache.update(new_B1TR, new_B1TP, self.layer_idx)
            return torch.cat((keys_B1SR[:, 0], values_B1SP[:, 0]), dim=-1), None
        return layer.latents(), layer.scales()

    def _layer_of(self, cache: Cache) -> Any:
        """This layer's part of the cache. `DynamicCache()` makes it when it is first updated."""
        layers = cache.layers
        return layers[self.layer_idx] if self.layer_idx < len(layers) else None

    def _appends_at_once(self, layer: Any, tokens: int, context: AttentionContext) -> bool:
        return (
            context.append_slots_M is not None
            and self.rotate
            and is_bare(self.kv_a_layernorm, MLARMSNorm)
            and not torch.is_grad_enabled()
            and isinstance(layer, LatentLayer | StaticLatentLayer | PagedLatentLayer)
            and layer.has_pages(tokens)
        )

    def expanded(
        self, q_BTHK: Tensor, latent_BSR: Tensor, k_rope_BSP: Tensor, context: AttentionContext
    ) -> Tensor:
        """Attention (B, T, H, V) of the last T of S positions over keys made from the latents."""
        config = self.config
        if context.branches is not None:
            attend = partial(self.expanded, context=replace(context, branches=None))
            return branched_attention(attend, q_BTHK, latent_BSR, k_rope_BSP, context.branches)
        heads = self._heads_at_once(latent_BSR, context)
        if heads == config.num_attention_heads:
            kv_BSHX = self.kv_b_proj(latent_BSR).unflatten(-1, (heads, -1))
            return self._attend(q_BTHK, kv_BSHX, k_rope_BSP, context)
        weight_HXR = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        pieces = [
            self._attend(q, F.linear(latent_BSR, w.flatten(0, 1)).unflatten(-1, w.shape[:2]),
                         k_rope_BSP, context)
            for q, w in zip(q_BTHK.split(heads, 2), weight_HXR.split(heads), strict=True)
        ]  # fmt: skip
        return torch.cat(pieces, dim=2)

    def _heads_at_once(self, latent_BSR: Tensor, context: AttentionContext) -> int:
        """How many heads' keys and values are made at a time: where no gradient needs them, no more
        than EXPANDED_BYTES hold.
        """
        config = self.config
        is_whole = torch.is_grad_enabled() or context.recorder is not None
        is_whole |= torch.compiler.is_compiling()  # the number would fix the lengths of a program
        if is_whole or plain_weight(self.kv_b_proj) is None:
            return config.num_attention_heads
        width = config.qk_nope_head_dim + config.v_head_dim + config.qk_head_dim
        head_bytes = latent_BSR.shape[:2].numel() * width * latent_BSR.element_size()
        return min(max(EXPANDED_BYTES // max(head_bytes, 1), 1), config.num_attention_heads)

    def _attend(
        self, q_BTHK: Tensor, kv_BSHX: Tensor, k_rope_BSP: Tensor, context: AttentionContext
    ) -> Tensor:
        """Attention (B, T, H, V) of some heads to their expanded keys and values."""
        config = self.config
        k_nope, v_BSHV = kv_BSHX.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        k_rope = k_rope_BSP[:, :, None].expand(-1, -1, kv_BSHX.shape[2], -1)
        k_BSHK = torch.cat((k_nope, k_rope.to(k_nope.dtype)), dim=-1)
        backend = self.operators.attention if context.mask_BTS is None else self.operators.masked
        return (context.recorder or backend).expanded(
            q_BTHK,
            k_BSHK,
            v_BSHV,
            scale=config.softmax_scale,
            mask_BTS=context.mask_BTS,
            segments=context.segments,
            document_ids_BT=context.document_ids_BT,
        )

    def _absorbed(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHP: Tensor,
        cache_BSC: Tensor,
        scale_BS: Tensor | None,
        context: AttentionContext,
        w_k_HNR: Tensor,
        w_v_HVR: Tensor,
    ) -> Tensor:
        q_latent_BTHR = _by_head(q_nope_BTHN, w_k_HNR)
        operators, lengths_B = self.operators, context.lengths_B
        most = operators.attention.capabilities.max_decode_queries
        if context.mask_BTS is not None:
            attention, lengths_B = operators.masked, None
        elif most is not None and q_rope_BTHP.shape[1] > most:
            attention, lengths_B = operators.many_queries, None
        else:
            attention = operators.attention
        if scale_BS is not None and not attention.capabilities.quantised_cache:
            cache_BSC, scale_BS = dequantise(cache_BSC, scale_BS, q_nope_BTHN.dtype), None
        out_BTHR = attention.absorbed(
            q_latent_BTHR,
            q_rope_BTHP,
            cache_BSC,
            scale=self.config.softmax_scale,
            mask_BTS=context.mask_BTS,
            lengths_B=lengths_B,
            cache_scale_BS=scale_BS,
            block_table_BN=context.block_table_BN,
        )
        return _by_head(out_BTHR, w_v_HVR.transpose(1, 2))

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The halves of `kv_b_proj` for keys (H, N, R) and values (H, V, R); None if the layer may
        be more than a matrix.
        """
        config = self.config
        weight = matrix_of(self.kv_b_proj, config.kv_lora_rank, dtype)
        if weight is None:
            return None
        weight_HXR = weight.unflatten(0, (config.num_attention_heads, -1))
        w_k_HNR, w_v_HVR = weight_HXR.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        return w_k_HNR, w_v_HVR


def _by_head(x_BTHX: Tensor, weight_HXY: Tensor) -> Tensor:
    """A product with one matrix a head, (B, T, H, X) -> (B, T, H, Y), without copying x."""
    out_HMY = torch.bmm(x_BTHX.flatten(0, 1).transpose(0, 1), weight_HXY)
    return out_HMY.transpose(0, 1).unflatten(0, x_BTHX.shape[:2])
