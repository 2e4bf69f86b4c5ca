"""Second moments of what a layer reads, added up in float64.

Queries, keys and values are linear in the input x of a layer's attention, biases included if x has
a 1 behind it. So the moment of `[x, 1]` gives the moments of all of them, in any basis, and the
text goes through the model once.

Legend: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Adds up `[x, 1] [x, 1]^T` over tokens.

    Attributes:
        count: tokens so far.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self._sum = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x_TD: Tensor) -> None:
        """Inputs (T, D) of any type."""
        x = torch.nn.functional.pad(x_TD.double(), (0, 1), value=1.0)
        self._sum.addmm_(x.T, x)
        self.count += x.shape[0]

    @property
    def second(self) -> Tensor:
        """`E[[x, 1] [x, 1]^T]`, (D + 1, D + 1) float64."""
        return self._sum / self.count
