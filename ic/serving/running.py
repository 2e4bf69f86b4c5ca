"""The requests of one HTTP request in the engine: their outputs as they come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing

from ic.inference.engine.request import Finish, Output, Request
from ic.inference.engine.threaded import ThreadedEngine
from ic.serving.errors import ApiError, failed, invalid, shutting_down
from ic.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)


class _UnreadError(Exception):
    """More outputs wait for the client than the server keeps."""


class Running:
    """Several requests that the engine works on at once.

    Args:
        unread: outputs that wait for `next` at most; None for any number.
        lagging: called when there are more, which ends the requests.
    """

    def __init__(
        self,
        engine: ThreadedEngine,
        requests: Sequence[Request],
        metrics: Metrics,
        unread: int | None = None,
        lagging: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._unread = unread
        self._lagging = lagging
        self._waiting: list[tuple[int, Output]] = []
        self._error: ApiError | None = None
        self._arrived = asyncio.Event()
        self._open = len(requests)
        self._tasks = [
            asyncio.create_task(self._follow(index, request))
            for index, request in enumerate(requests)
        ]

    async def next(self) -> list[tuple[int, Output]]:
        """The outputs since the last call, at least one, with the places of their requests; none
        after the last.

        Raises:
            ApiError: the engine refused a request, or failed.
        """
        if not self._open:
            return []
        await self._arrived.wait()
        self._arrived.clear()
        if self._error is not None:
            raise self._error
        found, self._waiting = self._waiting, []
        self._open -= sum(output.finish is not None for _, output in found)
        return found

    async def close(self) -> None:
        """Cancel what is not finished; the engine then frees its pages."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, index: int, request: Request) -> None:
        began = last = time.perf_counter()
        finish: Finish | None = None
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if output.token_ids:
                        now = time.perf_counter()
                        self._metrics.tokens(len(output.token_ids), now - last, first=last == began)
                        last = now
                    finish = output.finish
                    self._take(index, output)
        except ValueError as error:  # of the engine, about the request
            self._fail(invalid(str(error)))
        except _UnreadError:
            finish = None
            self._lagging()
        except Exception:
            _LOG.exception("the engine failed")
            finish = Finish.ERROR
            self._fail(failed())
        finally:
            self._metrics.finished(finish, began, time.perf_counter())

    def _take(self, index: int, output: Output) -> None:
        if output.finish is Finish.ERROR:
            self._fail(failed(output.error or "The engine failed."))
        elif output.finish is Finish.CANCELLED:
            self._fail(shutting_down())
        elif self._unread is not None and len(self._waiting) >= self._unread:
            raise _UnreadError
        else:
            self._waiting.append((index, output))
            self._arrived.set()

    def _fail(self, error: ApiError) -> None:
        self._error = error
        self._arrived.set()
