"""Endless batches over rows in a new order each epoch, shared out to ranks and workers, resumable.

Batch k takes the next rows of the epochs laid end to end, rank r of W every W-th of them, so
that no row is left out and none repeats within an epoch. What a batch holds depends on the seed and
its place alone, not on the number of worker processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch, without
from ic.datamodules.conversations import source_files
from ic.datamodules.epoch_length import EpochLength
from ic.datamodules.file_contents import refuse_shared_files
from ic.datamodules.options import EpochDataOptions
from ic.datamodules.workers import WorkerLoader, make_loader
from ic.parallel.replica import data_replica, length_multiple


class Generated(Protocol):
    """Micro-batches that are generated in between, and take no rows.

    Attributes:
        fraction: their share of all micro-batches.
    """

    fraction: float

    def takes(self, step: int) -> bool:
        """Whether this micro-batch is one of them."""

    def batch(self, step: int, rank: int) -> Batch:
        """It, a pure function of the arguments."""


Example = TypeVar("Example")
Row = TypeVar("Row")
# Epoch, and rows of it that were taken.
Place = tuple[int, int]


class EpochBatches(IterableDataset, Generic[Row]):
    """Batches with their `step` and `place`, where the next one begins.

    Args:
        rows_of_epoch: the rows of an epoch in its order; at least one.
        collate: this rank's rows -> batch.
        rows_per_batch: rows of a rank's batch.
        start: step and place to begin with.
        generated: what is generated in between; None for nothing.
    """

    def __init__(
        self,
        rows_of_epoch: Callable[[int], list[Row]],
        collate: Callable[[list[Row]], Batch],
        rows_per_batch: int,
        rank: int,
        world: int,
        start: tuple[int, Place],
        generated: Generated | None = None,
    ) -> None:
        self.rows_of_epoch, self.collate = rows_of_epoch, collate
        self.rows_per_batch, self.rank, self.world = rows_per_batch, rank, world
        self.start = start
        self.generated = generated

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        step, (epoch, row) = self.start
        rows = self.rows_of_epoch(epoch)
        turn = 0
        while True:
            if self.generated is not None and self.generated.takes(step):
                if turn % workers == worker:
                    yield {**self.generated.batch(step, self.rank), "place": (epoch, row)}
                step, turn = step + 1, turn + 1
                continue
            taken: list[Row] = []
            while len(taken) < self.rows_per_batch * self.world:
                if row >= len(rows):
                    epoch, row = epoch + 1, 0
                    rows = self.rows_of_epoch(epoch)
                part = rows[row : row + self.rows_per_batch * self.world - len(taken)]
                taken += part
                row += len(part)
            if turn % workers == worker:
                batch = self.collate(taken[self.rank :: self.world])
                yield {**batch, "step": step, "place": (epoch, row)}
            step, turn = step + 1, turn + 1


Config = TypeVar("Config", bound=EpochDataOptions)


class EpochDataModule(LightningDataModule, ABC, Generic[Config, Example, Row]):
    """Examples of local files, tokenized in memory; resumes where it stopped.

    A row is what a batch has `config.rows_per_batch` of: one or more examples by their index.
    Settings are `train_files`, `val_files` and `test_files`.

    Attributes:
        example_name: what an example is called, in the singular.
        file_example: name of a file, for the error that there is none.
        other_data_error: the error that a checkpoint was trained on other data.

    Raises:
        ValueError: bad data, named by its row, before training starts.
    """

    example_name: ClassVar[str]
    file_example: ClassVar[str]
    other_data_error: ClassVar[str]

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.next_step = 0
        self.place: Place = (0, 0)
        self._splits: dict[str, list[Example]] = {}

    @abstractmethod
    def _read(self, setting: str) -> list[Example]:
        """The examples of a setting's files."""

    @abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """Numbers of examples of training as the files hold them, and of their tokens."""

    @abstractmethod
    def _rows(self, setting: str, order: list[int]) -> list[Row]:
        """Rows of a setting's examples, given by their index in the order to take them in."""

    @abstractmethod
    def _collate(self, rows: list[Row], setting: str = "train_files") -> Batch:
        """A batch of rows of a setting."""

    @abstractmethod
    def _uncounted(self, batch: Batch, num_rows: int) -> Batch:
        """The batch with its last rows out of what is measured."""

    @abstractmethod
    def _digest(self) -> str:
        """Hash of the training data, kept in checkpoints to refuse other data."""

    @property
    def generated(self) -> Generated | None:
        """What is generated between the micro-batches of training."""
        return None

    @property
    def packed(self) -> bool:
        """Whether a row holds as many examples as there is room for."""
        return False

    @property
    def context_length(self) -> int:
        return self.config.context_length

    def examples(self, setting: str) -> list[Example]:
        """Those of a setting, read once."""
        if setting not in self._splits:
            self._splits[setting] = self._read(setting)
        return self._splits[setting]

    def check_files(self) -> None:
        """See `ReadsFiles`."""
        self._refuse_no_files("train_files")
        for setting in ("train_files", "val_files"):
            source_files(getattr(self.config, setting), setting)

    def setup(self, stage: str) -> None:
        wanted = {"fit": "train_files", "validate": "val_files"}.get(stage, "test_files")
        self._refuse_no_files(wanted)
        self._refuse_shared_files(["val_files", "test_files"] if stage == "fit" else [wanted])
        for setting in ("train_files", "val_files") if stage == "fit" else (wanted,):
            self.examples(setting)
        if stage == "fit" and self.trainer is not None:
            length, max_steps = self.epoch_length(), self.trainer.max_steps
            say = rank_zero_warn if length.too_often(max_steps) else rank_zero_info
            say(length.describe("data.train_files", max_steps))

    def epoch_length(self) -> EpochLength:
        """Of training by the trainer, or in one process that does not accumulate."""
        num_examples, num_tokens = self._sizes()
        _, world = self._rank_and_world
        micro_batches = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        generated = 0.0 if self.generated is None else self.generated.fraction
        return EpochLength(
            self.example_name,
            num_examples,
            num_tokens,
            len(self._rows_of_epoch(0)),
            self.context_length if self.packed else None,
            self.config.rows_per_batch * world * micro_batches * (1 - generated),
            exact=not generated,
        )

    def _refuse_no_files(self, setting: str) -> None:
        if not getattr(self.config, setting):
            raise ValueError(
                f"data.{setting} is empty: name the files, for example [{self.file_example}]"
            )

    def _refuse_shared_files(self, settings: list[str]) -> None:
        """Refuse evaluation on training files, where those are at hand."""
        try:
            training = source_files(self.config.train_files, "train_files")
        except ValueError:
            return  # training says what is wrong with them; evaluation does without
        refuse_shared_files(
            training,
            {
                f"data.{setting}": source_files(getattr(self.config, setting), setting)
                for setting in settings
            },
        )

    def train_dataloader(self) -> Iterable[Batch]:
        rank, world = self._rank_and_world
        stream = EpochBatches(
            self._rows_of_epoch,
            self._collate,
            self.config.rows_per_batch,
            rank,
            world,
            (self.next_step, self.place),
            self.generated,
        )
        workers = self.config.num_workers
        return make_loader(WorkerLoader, stream, self.config, workers, self.trainer)

    def val_dataloader(self) -> list[DataLoader] | DataLoader:
        if not self.config.val_files:
            rank_zero_info("no validation: name data.val_files to have it")
            return []
        return self._fixed("val_files")

    def test_dataloader(self) -> DataLoader:
        return self._fixed("test_files")

    predict_dataloader = test_dataloader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # This hook sees a batch when it is consumed, not when it was fetched ahead.
        if "place" not in batch:
            return batch
        self.next_step, self.place = batch["step"] + 1, batch["place"]
        return without(batch, "place")

    def state_dict(self) -> dict[str, Any]:
        return {"next_step": self.next_step, "place": list(self.place), "data": self._digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["data"] != self._digest():
            raise ValueError(self.other_data_error)
        self.next_step = state_dict["next_step"]
        self.place = (state_dict["place"][0], state_dict["place"][1])

    def _rows_of_epoch(self, epoch: int) -> list[Row]:
        count = len(self.examples("train_files"))
        order = list(range(count))
        if self.config.shuffle:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(count).tolist()
        return self._rows("train_files", order)

    def _fixed(self, setting: str) -> DataLoader:
        """Rows in the files' order; ranks make equally many, so the last may repeat a row, which
        then does not count.
        """
        rank, world = self._rank_and_world
        rows = self._rows(setting, list(range(len(self.examples(setting)))))
        each = -(-len(rows) // world)
        places = [rank + i * world for i in range(each)]
        size = self.config.rows_per_batch
        batches = [
            ([rows[place % len(rows)] for place in part], sum(place >= len(rows) for place in part))
            for part in (places[i : i + size] for i in range(0, each, size))
        ]
        return DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(self._collate_counted, setting=setting),
        )

    def _collate_counted(self, rows_and_repeats: tuple[list[Row], int], setting: str) -> Batch:
        rows, num_repeats = rows_and_repeats
        batch = self._collate(rows, setting)
        return self._uncounted(batch, num_repeats) if num_repeats else batch

    @property
    def length_multiple(self) -> int:
        """What rows of any length are padded to a multiple of."""
        return length_multiple(self.trainer)

    @property
    def _rank_and_world(self) -> tuple[int, int]:
        return data_replica(self.trainer)
