"""Multi-head Latent Attention in two forms with the same weights and the same result.

Expanded (training, prefill): keys and values of every head are made from the latents. Absorbed
(decode): the two halves of `kv_b_proj` are moved to the query and the output, so that all heads
attend to the latents themselves (arXiv 2405.04434, section 2.1.2; DeepSeek-V3
`inference/model.py`).

Legend: B batch, T new tokens, S visible tokens, D hidden, H heads, N qk_nope, P qk_rope,
K = N + P, V v_head, R kv_lora_rank, C = R + P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ic.model.cache import cached_latents
from ic.model.config import MLAConfig
from ic.model.norm import MLARMSNorm
from ic.model.rope import apply_rope
from ic.model.sdpa import Segments, causal_attention


@dataclass
class AttentionContext:
    """What every layer of one forward pass shares; made once by `MLAModel`.

    Attributes:
        cos_BTF, sin_BTF: rotation of the new tokens, (B or 1, T, P/2) float32.
        visible_BT: number of keys each new token sees (itself included), or None if no layer asks.
        mask_BTS: True where a key is visible; None for plain causal attention.
        segments: documents as (row, start, end), or None.
        document_ids_BT: the same documents as ids, or None.
    """

    cos_BTF: Tensor
    sin_BTF: Tensor
    visible_BT: Tensor | None = None
    mask_BTS: Tensor | None = None
    segments: Segments | None = None
    document_ids_BT: Tensor | None = None


class LengthTemperature(nn.Module):
    """Scale on the query that depends on the number of visible keys, so that softmax stays sharp at
    length.

    `llama4` is fixed: 1 + beta * log(1 + floor((n - 1) / original)). `ssmax` learns s for each
    head: s * log(n) (arXiv 2501.19399). It acts on q alone, hence every attention backend serves
    it.
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.kind = config.length_temperature
        self.beta = config.length_temperature_beta
        self.original = config.length_temperature_original
        if self.kind == "ssmax":
            self.scale = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, visible_BT: Tensor) -> Tensor:
        """Number of visible keys (B, T) -> factor (B, T, H or 1, 1), float32."""
        n = visible_BT.float()[..., None, None]
        if self.kind == "ssmax":
            return self.scale.float()[:, None] * n.log()
        return 1 + self.beta * torch.log1p(torch.floor((n - 1) / self.original))


class MLAAttention(nn.Module):
    """MLA with DeepSeek's weight names."""

    def __init__(self, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.rotate = layer_idx not in (config.nope_layers or [])
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = MLARMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_dim, bias=bias)
        self.kv_a_layernorm = MLARMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=bias)
        self.o_proj.is_residual_output = True  # type: ignore[assignment]  # read by init_weights
        if config.length_temperature != "none":
            self.length_temperature = LengthTemperature(config)
        self.triton = None
        if config.attention_backend == "triton":
            # Only here: Triton is not installed where there is no GPU.
            from ic.model import triton_backend

            self.triton = triton_backend

    def forward(
        self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); with a cache, appends T latents and attends to all of it."""
        batch, tokens, _ = hidden_BTD.shape
        q_BTHK = self._query(hidden_BTD, context)
        latent_BTR, k_rope_BTP = self._latent(hidden_BTD, context)
        if cache is None:
            out_BTHV = self._expanded(q_BTHK, latent_BTR, k_rope_BTP, context)
        else:
            latent_B1SR, k_rope_B1SP = cache.update(
                latent_BTR[:, None], k_rope_BTP[:, None], self.layer_idx
            )
            if tokens <= self.config.absorbed_max_queries:
                cache_BSC = cached_latents(cache, self.layer_idx)
                out_BTHV = self._absorbed(q_BTHK, cache_BSC, context)
            else:
                out_BTHV = self._expanded(q_BTHK, latent_B1SR[:, 0], k_rope_B1SP[:, 0], context)
        return self.o_proj(out_BTHV.reshape(batch, tokens, -1))

    def _query(self, hidden_BTD: Tensor, context: AttentionContext) -> Tensor:
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(hidden_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        q_BTHK = q.view(*hidden_BTD.shape[:2], -1, config.qk_head_dim)
        if self.rotate:
            nope, rope = q_BTHK.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
            q_BTHK = torch.cat((nope, self._rotate(rope, context)), dim=-1)
        if config.length_temperature != "none":
            assert context.visible_BT is not None
            q_BTHK = (q_BTHK * self.length_temperature(context.visible_BT)).to(q_BTHK.dtype)
        return q_BTHK

    def _latent(self, hidden_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_BTD).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1
        )
        if self.rotate:
            k_rope = self._rotate(k_rope[:, :, None], context)[:, :, 0]
        return self.kv_a_layernorm(latent), k_rope

    def _rotate(self, x_BTHP: Tensor, context: AttentionContext) -> Tensor:
        return apply_rope(
            x_BTHP, context.cos_BTF, context.sin_BTF, interleave=self.config.rope_interleave
        )

    def _expanded(
        self, q_BTHK: Tensor, latent_BSR: Tensor, k_rope_BSP: Tensor, context: AttentionContext
    ) -> Tensor:
        config = self.config
        kv = self.kv_b_proj(latent_BSR).view(*latent_BSR.shape[:2], config.num_attention_heads, -1)
        k_nope, v_BSHV = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        k_rope = k_rope_BSP[:, :, None].expand(-1, -1, config.num_attention_heads, -1)
        k_BSHK = torch.cat((k_nope, k_rope.to(k_nope.dtype)), dim=-1)
        if self.triton is not None and context.mask_BTS is None:
            return self.triton.expanded(
                q_BTHK, k_BSHK, v_BSHV,
                scale=config.softmax_scale, document_ids_BT=context.document_ids_BT,
            )  # fmt: skip
        return causal_attention(
            q_BTHK, k_BSHK, v_BSHV,
            scale=config.softmax_scale, mask_BTS=context.mask_BTS, segments=context.segments,
        )  # fmt: skip

    def _absorbed(self, q_BTHK: Tensor, cache_BSC: Tensor, context: AttentionContext) -> Tensor:
        config = self.config
        weight_HXR = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        w_k_HNR, w_v_HVR = weight_HXR.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        q_nope, q_rope = q_BTHK.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        q_BTHC = torch.cat(
            (torch.einsum("bthn,hnr->bthr", q_nope, w_k_HNR.to(q_nope.dtype)), q_rope), dim=-1
        )
        triton, tokens = self.triton, q_BTHK.shape[1]
        if triton is not None and context.mask_BTS is None and tokens <= triton.MAX_DECODE_QUERIES:
            out_BTHR = triton.absorbed(
                q_BTHC, cache_BSC, rank=config.kv_lora_rank, scale=config.softmax_scale
            )
            return torch.einsum("bthr,hvr->bthv", out_BTHR, w_v_HVR.to(out_BTHR.dtype))
        scores_BTHS = torch.einsum("bthc,bsc->bths", q_BTHC, cache_BSC) * config.softmax_scale
        visible = context.mask_BTS
        if visible is None and tokens > 1:
            keys = cache_BSC.shape[1]
            index = torch.arange(keys, device=q_BTHK.device)
            visible = index <= index[keys - tokens :, None]
        if visible is not None:
            scores_BTHS = scores_BTHS.masked_fill(~visible[..., None, :], -torch.inf)
        weights_BTHS = scores_BTHS.softmax(-1, dtype=torch.float32).to(cache_BSC.dtype)
        out_BTHR = torch.einsum(
            "bths,bsr->bthr", weights_BTHS, cache_BSC[..., : config.kv_lora_rank]
        )
        return torch.einsum("bthr,hvr->bthv", out_BTHR, w_v_HVR.to(out_BTHR.dtype))
