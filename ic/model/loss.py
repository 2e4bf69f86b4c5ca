"""Cross-entropy from hidden states without ever holding tokens x vocabulary logits.

Legend: M tokens (flattened), D hidden, W vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:  # the extra `gpu` is not installed
    LigerFusedLinearCrossEntropyLoss = None

IGNORE_INDEX = -100
# 4096 x 129280 float32 logits are 2 GiB; smaller vocabularies could take more, but gain nothing
# from it.
CHUNK_TOKENS = 4096


def linear_cross_entropy(hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against labels, over labels that are not -100;
    float32 scalar. Zero if no label counts.
    """
    count = (labels_M != IGNORE_INDEX).sum().clamp(min=1)
    return summed_linear_cross_entropy(hidden_MD, weight_WD, labels_M) / count


def summed_linear_cross_entropy(hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor) -> Tensor:
    """As `linear_cross_entropy`, summed over the labels instead of their mean.

    On a GPU with Liger installed its fused kernel runs; elsewhere chunks of the tokens are
    projected one after the other and projected again in the backward pass.
    """
    if hidden_MD.is_cuda and len(hidden_MD) and LigerFusedLinearCrossEntropyLoss is not None:
        fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
        return fused(weight_WD.to(hidden_MD.dtype), hidden_MD, labels_M)
    if hidden_MD.shape[0] <= CHUNK_TOKENS:
        return _summed(hidden_MD, weight_WD, labels_M)
    total = hidden_MD.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden_MD.shape[0], CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(
            _summed, hidden_MD[chunk], weight_WD, labels_M[chunk], use_reentrant=False
        )
    return total


def shift_labels(labels_BT: Tensor) -> Tensor:
    """Labels (B, T) aligned with the inputs -> labels of the next token; the last is ignored."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def _summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
