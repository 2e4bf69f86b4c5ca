"""An engine on a thread of its own, for servers that run on asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import torch

from ic.errors import one_line
from ic.inference.engine.engine import Engine
from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Finish, Output, Request
from ic.inference.engine.stats import EngineStats
from ic.inference.loading import Loaded


@dataclass(frozen=True)
class _Stream:
    """Where the outputs of a request go."""

    request: Request
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output]


class ThreadedEngine:
    """Answers requests of any number of event loops.

    Args:
        loaded, options: as of `Engine`, which is made at once and raises what it raises.
    """

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        self._engine = Engine(loaded, options)
        self._device = loaded.model.device
        self._changed = threading.Condition()
        # Under the condition: what to do before the next step, and who listens.
        self._added: list[Request] = []
        self._gone: list[str] = []
        self._streams: dict[str, _Stream] = {}
        self._is_closing = False
        # A daemon: a program that ends by an error does not wait for answers.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """As `Engine.check`."""
        self._engine.check(request)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Answer a request; if the caller goes away before the end, it is cancelled.

        A step that fails gives each request an output that says so.

        Raises:
            ValueError: as `Engine.add`, at the first output; or the engine is closed.
        """
        self.check(request)
        stream = _Stream(request, asyncio.get_running_loop(), asyncio.Queue())
        with self._changed:
            if self._is_closing:
                raise ValueError("the engine is closed: it takes no more requests")
            if request.id in self._streams:
                raise ValueError(f"Invalid 'id': {request.id!r} is the id of a request in work.")
            self._streams[request.id] = stream
            self._added.append(request)
            self._changed.notify()
        finish = None
        try:
            while finish is None:
                output = await stream.outputs.get()
                finish = output.finish
                yield output
        finally:
            if finish is None:
                with self._changed:
                    self._gone.append(request.id)
                    self._changed.notify()

    def stats(self) -> EngineStats:
        """As `Engine.stats`, from any thread."""
        return self._engine.stats()

    def close(self) -> None:
        """Cancel what is in work, and end the thread. A second call does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while self._take_orders():
            try:
                outputs = self._engine.step()
            except Exception as error:  # the engine has given up all requests, and goes on
                outputs = self._failed(error)
            self._tell(outputs)

    def _take_orders(self) -> bool:
        """Wait for something to do, and hand the engine what was asked; False after the last."""
        with self._changed:
            while not (self._added or self._gone or self._is_closing or self._engine.has_work):
                self._changed.wait()
            added, self._added = self._added, []
            gone, self._gone = self._gone, []
            closing = self._is_closing
            if closing:
                gone = list(self._streams)
        for request in added:
            self._engine.add(request)
        for request_id in gone:
            self._engine.cancel(request_id)
        return self._engine.has_work or not closing

    def _failed(self, error: Exception) -> list[Output]:
        """What to tell each request whose step failed."""
        with self._changed:
            asked_later = {request.id for request in self._added}
            failed = [
                stream.request for name, stream in self._streams.items() if name not in asked_later
            ]
        return [
            Output(
                request.id,
                token_ids=(),
                text="",
                logprobs=None,
                finish=Finish.ERROR,
                prompt_tokens=len(request.prompt_ids),
                cached_tokens=0,
                error=f"the engine failed: {one_line(error)}",
            )
            for request in failed
        ]

    def _tell(self, outputs: list[Output]) -> None:
        """Give outputs to who waits for them, all of an event loop at once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Output]]] = {}
        with self._changed:
            for output in outputs:
                stream = self._streams[output.request_id]
                by_loop.setdefault(stream.loop, []).append((stream, output))
                if output.finish is not None:
                    del self._streams[output.request_id]
        for loop, told in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, told)
            except RuntimeError:  # the loop is closed, and nobody listens
                with self._changed:
                    self._gone += [stream.request.id for stream, _ in told]


def _deliver(told: list[tuple[_Stream, Output]]) -> None:
    for stream, output in told:
        stream.outputs.put_nowait(output)
