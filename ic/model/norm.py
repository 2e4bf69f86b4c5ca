"""RMSNorm with Hugging Face's parameter name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLARMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Autocast would return float32 here and double the residual stream's memory.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
