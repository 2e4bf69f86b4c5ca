"""Requests of OpenAI's API, answered by the engine."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ic.inference.engine.threaded import ThreadedEngine
from ic.serving.admission import Admission
from ic.serving.errors import ApiError, ClientGoneError
from ic.serving.metrics import Metrics
from ic.serving.options import LimitOptions
from ic.serving.prompts import Prompts, Work
from ic.serving.requests import ChatBody, CompletionBody, parse
from ic.serving.responses import Choice, Json
from ic.serving.running import Running, Supervision
from ic.serving.streaming import EventStream, chunks

# Where `ic.serving.connection` puts what cuts a client off.
ABORT = "abort_connection"
# nginx's number for a client that did not wait; it shows in the metrics alone.
_CLIENT_GONE = 499


class Service:
    """Answers with one engine, within the limits.

    Args:
        name: what clients call the model.
    """

    def __init__(
        self, engine: ThreadedEngine, prompts: Prompts, limits: LimitOptions, name: str
    ) -> None:
        self.admission = Admission(limits.requests)
        self.metrics = Metrics(engine.stats, name)
        self._engine = engine
        self._prompts = prompts
        self._limits = limits

    async def complete(self, request: Request) -> Response:
        """/v1/completions."""
        return await self._answer(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions."""
        return await self._answer(request, ChatBody)

    async def _answer(
        self, request: Request, kind: type[CompletionBody] | type[ChatBody]
    ) -> Response:
        """The whole answer, or a stream, which holds its places and pages until it ends.

        Raises:
            ApiError: what the client is told instead.
        """
        async with AsyncExitStack() as held:
            place = self.admission.enter()
            held.callback(place.leave)
            try:
                body = parse(kind, await self._read(request))
                place.widen(body.num_answers)
                supervised = Supervision(
                    request.receive, self.admission.stopping, self._limits.answer_s
                )
                work = await supervised(self._prompts.work(body))
                if not body.streamed:
                    return JSONResponse(await supervised(self._whole(work)))
                running = Running(
                    self._engine,
                    work.requests,
                    self.metrics,
                    self._limits.unread_steps,
                    request.scope["state"][ABORT],
                )
                held.push_async_callback(running.close)
                # What the engine refuses has a status of its own, so the first output is awaited.
                first = await supervised(running.next())
            except (ClientGoneError, ClientDisconnect):
                return Response(status_code=_CLIENT_GONE)
            events = chunks(work, running, first, with_usage=body.with_usage)
            return EventStream(events, supervised, held.pop_all())

    async def _read(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            ApiError: it is too large, or does not arrive in time.
        """
        limit, seconds = self._limits.body_bytes, self._limits.read_s
        too_large = ApiError(
            413,
            f"The body of the request is larger than {limit} bytes, the server's limit.",
            code="request_too_large",
        )
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for piece in request.stream():
                    found += piece
                    if len(found) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408,
                f"The request did not arrive within {seconds:g} seconds.",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None
        return bytes(found)

    async def _whole(self, work: Work) -> Json:
        choices = [Choice() for _ in work.requests]
        running = Running(self._engine, work.requests, self.metrics)
        try:
            while found := await running.next():
                for index, output in found:
                    choices[index].add(output)
        finally:
            await running.close()
        return work.form.whole(choices, work.per_prompt)
