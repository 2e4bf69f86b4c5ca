"""SwiGLU feed-forward layer with DeepSeek's weight names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ic.model.config import MLAConfig
from ic.model.operators import FeedForwardOperators

# A prefill of 1M tokens would otherwise hold three activations of (1M, intermediate_size) at once.
INFERENCE_CHUNK_TOKENS = 65536


class MLAMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: MLAConfig, operators: FeedForwardOperators) -> None:
        super().__init__()
        self.operators = operators
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.is_residual_output = True  # type: ignore[assignment]  # read by init_weights

    def forward(self, x_BTD: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x_BTD.shape[1] <= INFERENCE_CHUNK_TOKENS:
            return self._swiglu(x_BTD)
        chunks = x_BTD.split(INFERENCE_CHUNK_TOKENS, dim=1)
        return torch.cat([self._swiglu(chunk) for chunk in chunks], dim=1)

    def _swiglu(self, x: Tensor) -> Tensor:
        return self.down_proj(self.operators.silu_mul(self.gate_proj(x), self.up_proj(x)))
