"""Requests of OpenAI's API, answered by the engine."""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ic.inference.engine.threaded import ThreadedEngine
from ic.serving.admission import Admission
from ic.serving.bodies import read_body
from ic.serving.connection import ABORT
from ic.serving.errors import CLIENT_GONE, ClientGoneError
from ic.serving.metrics import Metrics
from ic.serving.options import LimitOptions
from ic.serving.prompts import Prompts, Work
from ic.serving.requests import ChatBody, CompletionBody, parse
from ic.serving.responses import Choice, Json
from ic.serving.running import Running
from ic.serving.streaming import EventStream, chunks
from ic.serving.supervision import Supervision


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
                body = parse(
                    kind, await read_body(request, self._limits.body_bytes, self._limits.read_s)
                )
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
                return Response(status_code=CLIENT_GONE)
            events = chunks(work, running, first, with_usage=body.with_usage)
            return EventStream(events, supervised, held.pop_all())

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
