"""The loss of language modeling, from sums that several batches or ranks share."""

from __future__ import annotations

from torch import Tensor


def objective(
    answers: Tensor | None, all_tokens: Tensor | None, num_targets: Tensor, all_tokens_weight: float
) -> Tensor:
    """Mean cross-entropy of the answers + `all_tokens_weight` x mean of all targets.

    Without marked answers it is the mean of all targets. Linear in both sums: shares of them, each
    divided by the numbers of the whole, add up to the whole's loss.

    Args:
        answers: summed cross-entropy of the marked targets; None where none is marked.
        all_tokens: summed cross-entropy of all targets; None where its weight is 0.
        num_targets: (2,) numbers of marked and of all targets that the sums are to be divided by.
    """
    num_answers, num_all = num_targets.clamp(min=1)
    if answers is None:
        assert all_tokens is not None
        return all_tokens / num_all
    loss = answers / num_answers
    return loss if all_tokens is None else loss + all_tokens_weight * all_tokens / num_all
