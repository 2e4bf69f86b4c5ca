"""Targets of a batch: sums over them, to be divided by numbers that several batches or ranks share,
and log-probabilities of each.

Legend: B batch, S tokens of a sequence, T of them on this rank, M targets, D hidden, W vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ic.model.head import Head
from ic.model.labels import IGNORE_INDEX
from ic.model.loss import shift_labels
from ic.model.sharing import SequenceSharing


class TargetSums(NamedTuple):
    """Sums over this rank's targets.

    Attributes:
        num_targets: numbers of marked and of all targets, (2,) int64.
        all_tokens: summed cross-entropy of all targets, or None if not asked for.
        answers: summed cross-entropy of the marked targets, or None without marks.
        answer_labels: (M,) labels of the marked targets, in order, or None without marks.
        predicted: (M,) arg max at each of them, or None without marks.
        index_loss: the indexers' own loss, mean over this rank's queries and the layers, or None if
            not asked for.
    """

    num_targets: Tensor
    all_tokens: Tensor | None
    answers: Tensor | None = None
    answer_labels: Tensor | None = None
    predicted: Tensor | None = None
    index_loss: Tensor | None = None


class TargetLogProbs(NamedTuple):
    """This rank's targets.

    Attributes:
        log_probs: (M,) float32.
        row: (M,) int64, the sequence in the batch that each belongs to.
        position: (M,) int64, its place in the whole sequence.
    """

    log_probs: Tensor
    row: Tensor
    position: Tensor


def log_probs_of_targets(
    hidden_BTD: Tensor, head: Head, labels_BS: Tensor, parallel: SequenceSharing | None
) -> TargetLogProbs:
    """From this rank's hidden states; only those in front of a target meet the head.

    Args:
        labels_BS: aligned with the inputs, of the whole sequences.
    """
    next_BS = shift_labels(labels_BS)
    position_BS = torch.arange(1, next_BS.shape[1] + 1, device=next_BS.device).expand_as(next_BS)
    if parallel is not None:
        next_BS, position_BS = parallel.split(next_BS), parallel.split(position_BS)
    row_M, at_M = (next_BS != IGNORE_INDEX).nonzero(as_tuple=True)
    log_probs_M = head.log_probs(hidden_BTD[row_M, at_M], next_BS[row_M, at_M])
    return TargetLogProbs(log_probs_M, row_M, position_BS[row_M, at_M])


def sum_targets(
    hidden_BTD: Tensor,
    head: Head,
    labels_BS: Tensor,
    marks_BS: Tensor | None,
    *,
    parallel: SequenceSharing | None,
    all_tokens: bool,
) -> TargetSums:
    """Cross-entropy of this rank's hidden states.

    Args:
        labels_BS, marks_BS: of the next token each, of the whole sequences: they are shifted before
            they are split, because a token's target may lie in another rank's part.
        all_tokens: sum over all targets as well as over the marked ones.
    """
    if parallel is not None:
        labels_BS = parallel.split(labels_BS)
        marks_BS = None if marks_BS is None else parallel.split(marks_BS)
    hidden_MD, labels_M = hidden_BTD.flatten(0, 1), labels_BS.flatten()
    is_target_M = labels_M != IGNORE_INDEX
    total = head.summed_cross_entropy(hidden_MD, labels_M) if all_tokens else None
    if marks_BS is None:
        none = is_target_M.new_zeros((), dtype=torch.int64)
        return TargetSums(torch.stack((none, is_target_M.sum())), total)
    marked_M = marks_BS.flatten() & is_target_M
    num_targets = torch.stack((marked_M.sum(), is_target_M.sum()))
    at = marked_M.nonzero().flatten()
    answers = head.summed_cross_entropy(hidden_MD[at], labels_M[at])
    return TargetSums(num_targets, total, answers, labels_M[at], head.predicted(hidden_MD[at]))
