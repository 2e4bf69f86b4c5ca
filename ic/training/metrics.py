"""Metrics summed over batches and ranks before they are divided.

Ranks that share a batch each add all of it; sums and counts then grow alike, and means are right.
Legend: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ic.training.objective import objective
from ic.training.options import PREFERENCE_METRICS


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
        answers, all_tokens = self.sums
        marked = answers if self.counts[0] > 0 else None
        return objective(marked, all_tokens, self.counts, self.all_tokens_weight).float()


def perplexity(mean: Tensor) -> Tensor:
    """exp of a mean cross-entropy in nats, float32; the largest number where that is beyond it."""
    return mean.double().exp().clamp(max=torch.finfo(torch.float32).max).float()


def bits_per_byte(total: Tensor, num_bytes: Tensor) -> Tensor:
    """Bits that a model spends per byte of text, float32: unlike a loss per token it compares
    models of different tokenizers.

    Args:
        total: cross-entropy in nats, summed over all targets, the end of a document included.
        num_bytes: of text that these targets stand for.
    """
    return (total.double() / (math.log(2) * num_bytes.clamp(min=1))).float()


class Perplexity(Metric):
    """`perplexity` over a whole set of targets."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Summed cross-entropy of targets, and their number (for bits per byte, of their bytes)."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        return perplexity(self.total / self.count.clamp(min=1))


class TokenMean(Perplexity):
    """The plain mean over a whole set of targets."""

    def compute(self) -> Tensor:
        return (self.total / self.count.clamp(min=1)).float()


class BitsPerByte(Perplexity):
    """`bits_per_byte` over a whole set of targets."""

    def compute(self) -> Tensor:
        return bits_per_byte(self.total, self.count)


class Accuracy(Metric):
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


def bucket_masks(tokens_B: Tensor, edges: Sequence[int]) -> dict[str, Tensor]:
    """Which pairs (B,) bool lie in a length bucket: `to_<edge>` inclusive, then `above_<last>`."""
    masks, low = {}, 0
    for edge in edges:
        masks[f"to_{edge}"] = (tokens_B > low) & (tokens_B <= edge)
        low = edge
    if edges:
        masks[f"above_{low}"] = tokens_B > low
    return masks


class BucketMeans(Metric):
    """Means over pairs of any number of named values, of all pairs and by length bucket.

    The names are those of `preference_metrics` and `loss`; a bucket without a pair has no mean.
    """

    NAMES = PREFERENCE_METRICS

    def __init__(self, edges: Sequence[int]) -> None:
        super().__init__()
        self.edges = list(edges)
        self.labels = ["", *(f"/{label}" for label in bucket_masks(torch.zeros(0), edges))]
        shape = (len(self.labels), len(self.NAMES))
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(shape[0]), dist_reduce_fx="sum")
        self.sums: Tensor
        self.counts: Tensor

    def update(self, values: dict[str, Tensor], tokens_B: Tensor) -> None:
        """Add pairs: each of `NAMES` (B,), and their lengths (B,)."""
        stacked_BN = torch.stack([values[name].detach().double() for name in self.NAMES], dim=1)
        masks = bucket_masks(tokens_B, self.edges)
        inside_KB = torch.stack([torch.ones_like(tokens_B, dtype=torch.bool), *masks.values()])
        self.sums += inside_KB.double() @ stacked_BN
        self.counts += inside_KB.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """`name` and `name/bucket` -> mean."""
        return {
            name + label: (self.sums[k, n] / self.counts[k]).float()
            for k, label in enumerate(self.labels)
            if self.counts[k] > 0
            for n, name in enumerate(self.NAMES)
        }
