"""Endless batches over rows in a new order each epoch, shared out to ranks and workers, resumable.

Batch k takes the next rows of the epochs laid end to end, rank r of W every W-th of them, so
that no row is left out and none repeats within an epoch. What a batch holds depends on the seed and
its place alone, not on the number of worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

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
    """

    def __init__(
        self,
        rows_of_epoch: Callable[[int], list[Row]],
        collate: Callable[[list[Row]], dict[str, Any]],
        rows_per_batch: int,
        rank: int,
        world: int,
        start: tuple[int, Place],
    ) -> None:
        self.rows_of_epoch, self.collate = rows_of_epoch, collate
        self.rows_per_batch, self.rank, self.world = rows_per_batch, rank, world
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        step, (epoch, row) = self.start
        rows = self.rows_of_epoch(epoch)
        turn = 0
        while True:
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
