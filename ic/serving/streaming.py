"""Answers that are sent while they are made: server-sent events, as OpenAI streams them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ic.inference.engine.request import Output
from ic.serving.errors import ApiError, ClientGoneError
from ic.serving.prompts import Work
from ic.serving.responses import Choice, Json
from ic.serving.running import Running, Supervision


async def chunks(
    work: Work, running: Running, first: tuple[int, Output] | None, *, with_usage: bool
) -> AsyncIterator[Json]:
    """The chunks of an answer, as the engine makes it.

    Args:
        first: what `running` gave already.
        with_usage: a last chunk tells the tokens, and all others say that they do not.
    """
    choices = [Choice() for _ in work.requests]
    empty: Json = {"usage": None} if with_usage else {}
    found = first
    while found is not None:
        index, output = found
        choices[index].count(output)
        if (chunk := work.form.chunk(index, choices[index], output)) is not None:
            yield chunk | empty
        found = await running.next()
    if with_usage:
        yield work.form.last_chunk(choices, work.per_prompt)


class EventStream(Response):
    """Sends chunks as they come; an error on the way is the last event but one.

    Args:
        supervised: ends the stream when the client goes, the time is over or the server ends.
        held: what the answer holds, given back when the stream ends in any way.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[Json], supervised: Supervision, held: AsyncExitStack
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events: Any = events
        self._supervised = supervised
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._supervised(self._send_all(send))
            except ClientGoneError:
                return
            except ApiError as error:
                await _send_event(send, json.dumps(error.body))
            await _send_event(send, "[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await _send_event(send, json.dumps(event, ensure_ascii=False))


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode(errors="replace")
    await send({"type": "http.response.body", "body": body, "more_body": True})
