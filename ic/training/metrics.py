"""Metrics summed over batches and ranks before they are divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ObjectiveMean(Metric):
    """The training objective over a whole set: each term is a sum over all its targets, divided by
    their number.

    Args:
        all_tokens_weight: weight of the mean over all targets where answers are marked.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, all_tokens_weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.all_tokens_weight = all_tokens_weight
        # Two numbers each: of answers, of all targets.
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Sums (2,) of the cross-entropy and numbers (2,) of answers and of all targets."""
        self.sums += sums
        self.counts += counts

    def compute(self) -> Tensor:
        answers, all_tokens = self.sums / self.counts.clamp(min=1)
        mean = torch.where(
            self.counts[0] > 0, answers + self.all_tokens_weight * all_tokens, all_tokens
        )
        return mean.float()


class Share(Metric):
    """Share of right answers among all."""

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, correct_M: Tensor) -> None:
        """Whether each of M answer tokens is right."""
        self.correct += correct_M.sum()
        self.total += correct_M.numel()

    def compute(self) -> Tensor:
        return self.correct / self.total.clamp(min=1)
