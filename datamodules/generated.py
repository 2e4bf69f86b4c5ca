"""Data that are generated while training: a pure function of (seed, split, step, rank, length)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ic.datamodules.accumulation import take_lookahead, with_lookahead
from ic.datamodules.batch import Batch
from ic.datamodules.options import GeneratedDataOptions
from ic.datamodules.synthetic import Sequence
from ic.datamodules.workers import WorkerLoader, make_loader
from ic.parallel.replica import data_replica


class MakeBatch(Protocol):
    """Makes the batch of a step; a pure function of its arguments, whatever process calls it."""

    def __call__(self, *, split: str, step: int, rank: int, context_length: int) -> Batch: ...


def stack_sequences(sequences: list[Sequence], step: int) -> Batch:
    """The batch of a step, of sequences of one length."""
    input_ids = torch.from_numpy(np.stack([s.tokens for s in sequences])).long()
    batch: Batch = {
        "input_ids": input_ids,
        "labels": input_ids.clone(),
        "position_ids": torch.from_numpy(np.stack([s.position_ids for s in sequences])),
        "answer_mask": torch.from_numpy(np.stack([s.is_answer for s in sequences])),
        "step": step,
    }
    if any(sequence.answers for sequence in sequences):
        batch["answers"] = [sequence.answers for sequence in sequences]
    documents = [sequence.document_ids for sequence in sequences]
    if any(each is not None for each in documents):
        one = np.zeros(len(sequences[0].tokens), dtype=np.int32)
        filled = [one if each is None else each for each in documents]
        batch["document_ids"] = torch.from_numpy(np.stack(filled))
    return batch


class _TrainStream(IterableDataset):
    """Batches from `next_step` on, read when iteration begins; worker w of W makes every W-th."""

    def __init__(
        self,
        make_batch: MakeBatch,
        rank: int,
        next_step: torch.Tensor,
        context_length: torch.Tensor,
    ) -> None:
        self.make_batch, self.rank, self.next_step = make_batch, rank, next_step
        self.context_length = context_length

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        index, count = (0, 1) if info is None else (info.id, info.num_workers)
        step = int(self.next_step) + index
        while True:
            yield self.make_batch(
                split="train", step=step, rank=self.rank, context_length=int(self.context_length)
            )
            step += count


class _FixedSet(torch.utils.data.Dataset):
    """The same few batches each time, at full length."""

    def __init__(
        self, make_batch: MakeBatch, config: GeneratedDataOptions, split: str, rank: int
    ) -> None:
        self.make_batch, self.config, self.split, self.rank = make_batch, config, split, rank

    def __len__(self) -> int:
        return self.config.val_batches

    def __getitem__(self, step: int) -> Batch:
        return self.make_batch(
            split=self.split, step=step, rank=self.rank, context_length=self.config.context_length
        )


class GeneratedDataModule(LightningDataModule):
    """Batches of a `MakeBatch`; deterministic in (seed, step, rank).

    `set_context_length` (used by the curriculum) takes effect with the next batch that is consumed:
    batches that a worker or Lightning fetched ahead at another length are made again. With that,
    the data of a step depends on nothing but its index and the length, and a resumed run sees what
    an unbroken one does.
    """

    def __init__(self, config: GeneratedDataOptions, make_batch: MakeBatch) -> None:
        super().__init__()
        self.config = config
        self.make_batch = make_batch
        # A tensor: the stream, and each worker when an epoch begins, reads it from the same memory.
        self._next_step = torch.tensor(0)
        # Shared with the workers, so that a new length reaches batches not yet begun.
        self._context_length = torch.tensor(config.context_length)
        if config.num_workers:
            self._context_length.share_memory_()

    @property
    def next_step(self) -> int:
        return int(self._next_step)

    @property
    def context_length(self) -> int:
        return int(self._context_length)

    def set_context_length(self, tokens: int) -> None:
        """Length of the next training batch, at most `config.context_length`."""
        if not self.config.LEAST_LENGTH <= tokens <= self.config.context_length:
            raise ValueError(
                f"context length {tokens}: must lie between {self.config.LEAST_LENGTH} and "
                f"data.context_length={self.config.context_length}"
            )
        self._context_length.fill_(tokens)

    def train_dataloader(self) -> Iterable[Batch]:
        stream = _TrainStream(self.make_batch, self._rank, self._next_step, self._context_length)
        workers = self.config.num_workers
        loader = make_loader(WorkerLoader, stream, self.config, workers, self.trainer)
        return with_lookahead(loader, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return self._fixed("validation")

    def test_dataloader(self) -> DataLoader:
        return self._fixed("test")

    predict_dataloader = test_dataloader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return batch
        # This hook sees a batch when it is consumed, not when it was fetched ahead.
        batch = take_lookahead(batch, trainer, self._at_length)
        self._next_step.fill_(batch["step"] + 1)
        return batch

    def _at_length(self, batch: Batch) -> Batch:
        """The batch, made again if it is of another length than the present one."""
        if batch["input_ids"].shape[1] == self.context_length:
            return batch
        return self.make_batch(
            split="train", step=batch["step"], rank=self._rank, context_length=self.context_length
        )

    def state_dict(self) -> dict[str, Any]:
        return {"next_step": self.next_step, "context_length": self.context_length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._next_step.fill_(state_dict["next_step"])
        # A later stage of the ladder may have a shorter or longer limit than the saved run.
        self._context_length.fill_(min(state_dict["context_length"], self.config.context_length))

    @property
    def _rank(self) -> int:
        return data_replica(self.trainer)[0]

    def _fixed(self, split: str) -> DataLoader:
        return DataLoader(
            _FixedSet(self.make_batch, self.config, split, self._rank), batch_size=None
        )
