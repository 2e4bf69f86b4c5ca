"""How many answers are in work, and whether more are taken."""

from __future__ import annotations

import asyncio

from ic.serving.errors import invalid, shutting_down, too_many


class Admission:
    """Counts the answers in work, up to a limit. Of one event loop.

    Attributes:
        draining: whether the server was told to end, and takes no further request.
        stopping: set when the answers in work are to be given up as well.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.draining = False
        self.stopping = asyncio.Event()
        self._in_work = 0

    @property
    def in_work(self) -> int:
        return self._in_work

    def enter(self) -> Place:
        """A place for one answer.

        Raises:
            ApiError: 503 once the server was told to end, 429 where all places are taken.
        """
        if self.draining:
            raise shutting_down()
        place = Place(self)
        place.widen(1)
        return place

    def change(self, by: int) -> None:
        """Take places, or give them back."""
        if by > 0 and self._in_work + by > self.limit:
            raise too_many(self.limit)
        self._in_work += by


class Place:
    """The places of one request; `leave` gives them back, once."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._size = 0

    def widen(self, size: int) -> None:
        """Take as many places as the request has answers.

        Raises:
            ApiError: 400 where the server never has so many, 429 where it has not now.
        """
        if size > self._admission.limit:
            raise invalid(
                f"The request asks for {size} answers, prompts times 'n', but this server works "
                f"on {self._admission.limit} at once at most. Send several requests.",
                "n",
                "invalid_value",
            )
        self._admission.change(size - self._size)
        self._size = size

    def leave(self) -> None:
        self._admission.change(-self._size)
        self._size = 0
