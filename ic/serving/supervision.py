"""Work on an answer, which ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from ic.serving.errors import ClientGoneError, shutting_down, timed_out

T = TypeVar("T")


class Supervision:
    """Waits for work on one answer, and cancels it when nobody needs it any more.

    Args:
        receive: of ASGI, once the body of the request has been read.
        stopping: set when the server gives up what is in work.
        limit_s: from now on.
    """

    def __init__(self, receive: Receive, stopping: asyncio.Event, limit_s: float) -> None:
        self._receive = receive
        self._stopping = stopping
        self._limit_s = limit_s
        self._deadline = asyncio.get_running_loop().time() + limit_s

    async def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`.

        Raises:
            ClientGoneError: the client has gone.
            ApiError: the time is over, the server ends, or what `work` raises.
        """
        loop = asyncio.get_running_loop()
        working = loop.create_task(work)
        gone = loop.create_task(self._gone())
        ending = loop.create_task(self._stopping.wait())
        tasks = (working, gone, ending)
        try:
            await asyncio.wait(
                tasks,
                timeout=max(0.0, self._deadline - loop.time()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if working.done():
                return working.result()
            if gone.done():
                raise ClientGoneError
            raise shutting_down() if ending.done() else timed_out(self._limit_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
