"""RMSNorm with Hugging Face's parameter name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ic.model.operators import NormOperators


class MLARMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in float32, result in x's dtype.

    Args:
        dim: size of the last dimension.
        operators: what computes it, and the residual addition before it.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, operators: NormOperators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.operators = operators

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual the norm of x + residual, and that sum."""
        if residual is None:
            return self.operators.rms_norm(x, self.weight, self.eps)
        return self.operators.add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, {type(self.operators).__name__}"
