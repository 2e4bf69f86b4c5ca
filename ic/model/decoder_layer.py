"""One decoder layer.

Legend: B batch, T new tokens, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ic.model.attention import MLAAttention
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.mlp import MLAMLP
from ic.model.norm import MLARMSNorm
from ic.model.operators import Operators


class MLADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, config: MLAConfig, layer_idx: int, operators: Operators) -> None:
        super().__init__()
        self.self_attn = MLAAttention(config, layer_idx, operators)
        self.mlp = MLAMLP(config, operators.feed_forward)
        norm = partial(
            MLARMSNorm, config.hidden_size, config.rms_norm_eps, operators=operators.norm
        )
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def forward(
        self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache | None = None
    ) -> Tensor:
        if cache is None:
            return self._without_cache(hidden_BTD, context)
        return self._block(hidden_BTD, context, cache)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the pass without a cache, with its arguments.

        Over a cache, whose length is another in each call, the layer stays as it is.
        """
        self._without_cache = torch.compile(self._without_cache, *args, **kwargs)  # type: ignore[method-assign]

    def _without_cache(self, hidden_BTD: Tensor, context: AttentionContext) -> Tensor:
        return self._block(hidden_BTD, context, None)

    def _block(self, hidden_BTD: Tensor, context: AttentionContext, cache: Cache | None) -> Tensor:
        attended_BTD = self.self_attn(self.input_layernorm(hidden_BTD), context, cache)
        normed_BTD, hidden_BTD = self.post_attention_layernorm(attended_BTD, residual=hidden_BTD)
        return hidden_BTD + self.mlp(normed_BTD)
