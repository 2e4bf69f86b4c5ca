"""Cross-entropy and log-probabilities from hidden states without ever holding tokens x vocabulary
logits.

Legend: M tokens (flattened), D hidden, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ic.model.labels import IGNORE_INDEX

# 4096 x 129280 float32 logits are 2 GiB; smaller vocabularies could take more, but gain nothing
# from it.
CHUNK_TOKENS = 4096

# Hidden states, the head's weight and labels -> their summed cross-entropy.
Summed = Callable[[Tensor, Tensor, Tensor], Tensor]
# Hidden states (M, D) -> logits (M, W).
Project = Callable[[Tensor], Tensor]


def summed_linear_cross_entropy(hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against labels, summed over those that are not -100;
    float32 scalar.

    Chunks of the tokens are projected one after the other and projected again in the backward pass.
    """

    def project(hidden: Tensor) -> Tensor:
        return F.linear(hidden, weight_WD.to(hidden.dtype))

    return summed_cross_entropy_of(project, hidden_MD, labels_M)


def summed_cross_entropy_of(project: Project, hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
    """As `summed_linear_cross_entropy`, of any projection of the hidden states."""
    if hidden_MD.shape[0] <= CHUNK_TOKENS:
        return _summed(project, hidden_MD, labels_M)
    total = hidden_MD.new_zeros((), dtype=torch.float32)
    for chunk in _chunks(hidden_MD.shape[0]):
        total = total + checkpoint(
            _summed, project, hidden_MD[chunk], labels_M[chunk], use_reentrant=False
        )
    return total


def shift_labels(labels_BT: Tensor) -> Tensor:
    """Labels (B, T) aligned with the inputs -> labels of the next token; the last is ignored."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def _summed(project: Project, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = project(hidden).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def selective_log_probs_of(project: Project, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
    """As `selective_log_probs`, of any projection of the hidden states."""
    chunks = [
        checkpoint(_selected, project, hidden_MD[chunk], targets_M[chunk], use_reentrant=False)
        for chunk in _chunks(len(hidden_MD)) or [slice(0)]  # no token still has gradients: zeros
    ]
    return torch.cat(chunks)


def _selected(project: Project, hidden: Tensor, targets: Tensor) -> Tensor:
    log_probs = project(hidden).float().log_softmax(-1)
    return log_probs.gather(-1, targets[:, None]).squeeze(-1)


def selective_log_probs(hidden_MD: Tensor, weight_WD: Tensor, targets_M: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T) at the targets, float32 (M,).

    Chunks of the tokens are projected one after the other; the backward pass projects them again
    from the log-normalizer that the forward pass kept, so that the largest tensor either pass holds
    is one chunk of logits. Gradients accumulate in float32.
    """
    log_probs_M: Tensor = _SelectiveLogProbs.apply(hidden_MD, weight_WD, targets_M)
    return log_probs_M


class _SelectiveLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_WD: Tensor, targets_M: Tensor) -> Tensor:
        weight = weight_WD.to(hidden_MD.dtype)
        tokens = len(hidden_MD)
        normalizer_M = hidden_MD.new_empty(tokens, dtype=torch.float32)
        log_probs_M = torch.empty_like(normalizer_M)
        for chunk in _chunks(tokens):
            logits = F.linear(hidden_MD[chunk], weight).float()
            normalizer_M[chunk] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets_M[chunk, None]).squeeze(-1)
            log_probs_M[chunk] = chosen - normalizer_M[chunk]
        ctx.save_for_backward(hidden_MD, weight_WD, targets_M, normalizer_M)
        return log_probs_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_M,) = grads
        hidden_MD, weight_WD, targets_M, normalizer_M = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        weight = weight_WD.to(hidden_MD.dtype)
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.float32) if needs_weight else None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for chunk in _chunks(len(hidden_MD)):
                logits = F.linear(hidden_MD[chunk], weight).float()
                grad = logits.sub_(normalizer_M[chunk, None]).exp_().mul_(-grad_M[chunk, None])
                grad.scatter_add_(-1, targets_M[chunk, None], grad_M[chunk, None])
                grad = grad.to(hidden_MD.dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad @ weight
                if grad_weight is not None:
                    grad_weight += (grad.T @ hidden_MD[chunk]).float()
        return (grad_hidden, None if grad_weight is None else grad_weight.to(weight_WD.dtype), None)


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, tokens, CHUNK_TOKENS)]
