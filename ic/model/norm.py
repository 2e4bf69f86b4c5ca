"""RMSNorm with Hugging Face's parameter name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ic.model.backends import triton_kernels


class MLARMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype.

    Args:
        dim: size of the last dimension.
        backend: `torch`, or `triton` for our kernels, which also do the residual addition.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, backend: str = "torch") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual the norm of x + residual, and that sum."""
        if self.backend == "triton":
            kernels = triton_kernels()
            if residual is None:
                return kernels.rms_norm(x, self.weight, self.eps)
            return kernels.add_rms_norm(x, residual, self.weight, self.eps)
        if residual is None:
            return self._norm(x)
        total = x + residual
        return self._norm(total), total

    def _norm(self, x: Tensor) -> Tensor:
        # Autocast would return float32 here and double the residual stream's memory.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, backend={self.backend}"
