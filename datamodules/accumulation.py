"""Target counts of a whole optimizer step, known before its first micro-batch is trained on.

The loss of a step is a mean over the targets of all its micro-batches. Its gradient is accumulated
micro-batch by micro-batch, so the number to divide by is needed at the first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from lightning import Trainer
from torch import Tensor

from ic.datamodules.batch import Batch, without
from ic.model.labels import IGNORE_INDEX


class Lookahead:
    """Batches of a loader, each with the next `num_ahead` of them under `ahead`.

    Reads that many batches further than it has given out; the last of a finite loader have fewer.
    """

    def __init__(self, loader: Iterable[Batch], num_ahead: int) -> None:
        self.loader = loader
        self.num_ahead = num_ahead

    def __iter__(self) -> Iterator[Batch]:
        window: deque[Batch] = deque()
        for batch in self.loader:
            window.append(batch)
            if len(window) > self.num_ahead:
                yield {**window.popleft(), "ahead": list(window)}
        while window:
            yield {**window.popleft(), "ahead": list(window)}


def with_lookahead(loader: Iterable[Batch], trainer: Trainer | None) -> Iterable[Batch]:
    """The loader, with lookahead if the trainer accumulates gradients."""
    num_ahead = 0 if trainer is None else trainer.accumulate_grad_batches - 1
    return Lookahead(loader, num_ahead) if num_ahead else loader


def take_lookahead(batch: Batch, trainer: Trainer, prepare: Callable[[Batch], Batch]) -> Batch:
    """`prepare(batch)` without `ahead`; the first micro-batch of a step gains `num_targets`.

    Args:
        batch: as it comes from the loader, when it is about to be trained on.
        prepare: what the datamodule does to a batch at that point.
    """
    ahead = batch.get("ahead", [])
    prepared = prepare(without(batch, "ahead"))
    if "ahead" not in batch:
        return prepared
    index = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    every = trainer.accumulate_grad_batches
    if index % every:
        return prepared
    # An epoch that ends within the step ends the step.
    rest = int(min(every - 1, trainer.num_training_batches - index - 1))
    counts = [count_targets(prepared), *(count_targets(prepare(b)) for b in ahead[:rest])]
    return {**prepared, "num_targets": torch.stack(counts).sum(0)}


def count_targets(batch: Batch) -> Tensor:
    """Numbers of marked and of all targets, (2,) int64, on the batch's device."""
    is_target = batch["labels"][:, 1:] != IGNORE_INDEX
    marks = batch.get("answer_mask")
    answers = is_target.new_zeros(()) if marks is None else (is_target & marks[:, 1:]).sum()
    return torch.stack((answers.long(), is_target.sum()))
