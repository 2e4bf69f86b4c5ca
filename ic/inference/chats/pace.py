"""How far the conversations are, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from ic.display.numbers import clock_text
from ic.inference.chats.record import ChatRecord


class Pace:
    """The rest takes as long a batch, with as many dropped, as those that were written here.

    Args:
        record: what is written; it says nothing of how fast others were that it holds already.
        count: conversations that are asked for.
        clock: the seconds now, of which only differences matter.
    """

    def __init__(
        self, record: ChatRecord, count: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._record, self._count, self._clock = record, count, clock
        self._chats_before, self._batches_before = len(record.chats), record.num_batches
        self._started_s = self._batch_began_s = clock()

    def batch_done(self) -> None:
        """Take note that the record has a further batch."""
        self._batch_began_s = self._clock()

    def __str__(self) -> str:
        """`453 of 3000 conversations, 1024 begun, 571 dropped, about 0:12:30 left`, as far as it is
        known.
        """
        record = self._record
        said = f"{min(len(record.chats), self._count)} of {self._count} conversations"
        if record.begun:
            said += f", {record.begun} begun, {sum(record.dropped.values())} dropped"
        left_s = self._left_s()
        return said if left_s is None else f"{said}, about {clock_text(left_s)} left"

    def _left_s(self) -> float | None:
        record = self._record
        made = len(record.chats) - self._chats_before
        batches = record.num_batches - self._batches_before
        if not made or record.is_complete:
            return None
        more = -(-(self._count - len(record.chats)) * batches // made)  # whole ones: rounded up
        per_batch_s = (self._batch_began_s - self._started_s) / batches
        return max(0.0, more * per_batch_s - (self._clock() - self._batch_began_s))
