"""A scale on the query by the number of keys that it sees.

Legend: B batch, T new tokens, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ic.model.config import MLAConfig


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
        n = visible_BT[..., None, None]
        if self.kind == "ssmax":
            return self.scale[:, None] * n.log()  # the logarithm of integers is float32
        return 1 + self.beta * torch.log1p(torch.floor((n - 1) / self.original))
