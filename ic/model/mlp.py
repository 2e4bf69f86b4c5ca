"""SwiGLU feed-forward layer with DeepSeek's weight names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ic.model.config import MLAConfig

try:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
except ImportError:  # the extra `gpu` is not installed
    LigerSiLUMulFunction = None

# A prefill of 1M tokens would otherwise hold three activations of (1M, intermediate_size) at once.
INFERENCE_CHUNK_TOKENS = 65536


class MLAMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
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
        return self.down_proj(_silu_mul(self.gate_proj(x), self.up_proj(x)))


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; Liger's kernel on a GPU keeps one activation less for the backward pass."""
    is_fused_by_compiler = torch.compiler.is_compiling()
    if gate.is_cuda and LigerSiLUMulFunction is not None and not is_fused_by_compiler:
        return LigerSiLUMulFunction.apply(gate, up)
    return F.silu(gate) * up
