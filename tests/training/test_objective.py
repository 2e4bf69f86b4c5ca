"""The loss of language modeling against means taken the long way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ic.training.metrics import ObjectiveMean
from ic.training.objective import objective

WEIGHT = 0.25
LOSSES = torch.tensor([4.0, 1.0, 7.0, 2.0, 6.0])  # of each target
MARKED = torch.tensor([True, False, False, True, False])
COUNTS = torch.tensor([2, 5])


@pytest.mark.parametrize(
    ("marked", "weight", "expected"),
    [
        (True, WEIGHT, (4 + 2) / 2 + WEIGHT * (4 + 1 + 7 + 2 + 6) / 5),
        (True, 0.0, (4 + 2) / 2),
        (False, WEIGHT, (4 + 1 + 7 + 2 + 6) / 5),
    ],
)
def test_means_of_answers_and_of_all(marked: bool, weight: float, expected: float) -> None:
    answers = LOSSES[MARKED].sum() if marked else None
    everything = LOSSES.sum() if weight or not marked else None
    assert objective(answers, everything, COUNTS, weight).item() == pytest.approx(expected)


def test_shares_add_up_to_the_whole() -> None:
    """However targets are dealt out over micro-batches and ranks."""
    whole = objective(LOSSES[MARKED].sum(), LOSSES.sum(), COUNTS, WEIGHT)
    parts: list[Tensor] = []
    for part in (slice(0, 2), slice(2, 5)):
        losses, marked = LOSSES[part], MARKED[part]
        parts.append(objective(losses[marked].sum(), losses.sum(), COUNTS, WEIGHT))
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize("marked", [True, False])
def test_a_validation_set_has_the_loss_of_one_large_batch(marked: bool) -> None:
    metric = ObjectiveMean(WEIGHT)
    marks = MARKED if marked else torch.zeros_like(MARKED)
    for part in (slice(0, 3), slice(3, 5)):
        losses, here = LOSSES[part], marks[part]
        sums = torch.stack([losses[here].sum(), losses.sum()])
        metric.update(sums, torch.tensor([int(here.sum()), len(losses)]))
    answers = LOSSES[MARKED].sum() if marked else None
    torch.testing.assert_close(metric.compute(), objective(answers, LOSSES.sum(), COUNTS, WEIGHT))


def test_nothing_to_learn_is_no_loss() -> None:
    """A rank whose share has no target divides by one, not by zero."""
    nothing = torch.zeros(())
    assert objective(nothing, nothing, torch.zeros(2, dtype=torch.int64), WEIGHT).item() == 0
