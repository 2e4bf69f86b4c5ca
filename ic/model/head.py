"""The language model's head as the losses need it: never all logits at once.

Legend: M tokens (flattened), D hidden, W vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ic.model.labels import IGNORE_INDEX
from ic.model.loss import (
    Summed,
    selective_log_probs,
    selective_log_probs_of,
    summed_cross_entropy_of,
)
from ic.model.plain_layers import plain_weight


@dataclass(frozen=True)
class Head:
    """Losses of hidden states.

    Attributes:
        layer: hidden states (M, D) -> logits (M, W). A stock linear layer's weight goes to fused
            kernels; any other layer, such as one with an adapter, is called itself.
        summed: cross-entropy from hidden states, weight and labels.
    """

    layer: nn.Module
    summed: Summed

    def summed_cross_entropy(self, hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
        """Summed over the labels that are not -100; float32 scalar."""
        weight_WD = plain_weight(self.layer)
        if weight_WD is None:
            return summed_cross_entropy_of(self.layer, hidden_MD, labels_M)
        return self.summed(hidden_MD, weight_WD, labels_M)

    def mean_cross_entropy(
        self, hidden_MD: Tensor, labels_M: Tensor, num_items: int | Tensor | None = None
    ) -> Tensor:
        """The mean over `num_items`, or over the labels that are not -100: zero without any."""
        count: int | Tensor
        if num_items is None:
            count = (labels_M != IGNORE_INDEX).sum().clamp(min=1)
        else:
            count = num_items.to(hidden_MD.device) if isinstance(num_items, Tensor) else num_items
        return self.summed_cross_entropy(hidden_MD, labels_M) / count

    def log_probs(self, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
        """log softmax of the logits at the targets, float32 (M,)."""
        weight_WD = plain_weight(self.layer)
        if weight_WD is None:
            return selective_log_probs_of(self.layer, hidden_MD, targets_M)
        return selective_log_probs(hidden_MD, weight_WD, targets_M)

    @torch.no_grad()
    def predicted(self, hidden_MD: Tensor) -> Tensor:
        """arg max of the logits, (M,) int64."""
        weight_WD = plain_weight(self.layer)
        if weight_WD is None:
            return self.layer(hidden_MD).argmax(-1)
        return F.linear(hidden_MD, weight_WD.to(hidden_MD.dtype)).argmax(-1)
