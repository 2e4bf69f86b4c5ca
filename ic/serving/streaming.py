"""Answers that are sent while they are made: server-sent events, as OpenAI streams them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ic.inference.engine.request import Output
from ic.serving.errors import ApiError, ClientGoneError
from ic.serving.prompts import Work
from ic.serving.responses import Choice, Json
from ic.serving.running import Running
from ic.serving.supervision import Supervision


async def chunks(
    work: Work, running: Running, first: list[tuple[int, Output]], *, with_usage: bool
) -> AsyncIterator[Json]:
    """The chunks of an answer, as the engine makes it.

    What came while the chunk before was sent becomes one chunk for each choice: a slow client or
    a busy server gets fewer and longer ones.

    Args:
        first: what `running` gave already.
        with_usage: a last chunk tells the tokens, and all others say that they do not.
    """
    choices = [Choice() for _ in work.requests]
    empty: Json = {"usage": None} if with_usage else {}
    found = first
    while found:
        by_choice: dict[int, list[Output]] = {}
        for index, output in found:
            by_choice.setdefault(index, []).append(output)
        for index, outputs in by_choice.items():
            output = outputs[0] if len(outputs) == 1 else _joined(outputs)
            choices[index].count(output)
            if (chunk := work.form.chunk(index, choices[index], output)) is not None:
                yield chunk | empty
        found = await running.next()
    if with_usage:
        yield work.form.last_chunk(choices, work.per_prompt)


def _joined(outputs: list[Output]) -> Output:
    """Outputs of one request as one."""
    return replace(
        outputs[-1],
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(each for output in outputs for each in output.logprobs or ()) or None,
    )


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
                await _send_event(send, to_json(error.body))
            await _send_event(send, b"[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await _send_event(send, to_json(event))


async def _send_event(send: Send, data: bytes) -> None:
    event = b"data: %b\n\n" % data
    await send({"type": "http.response.body", "body": event, "more_body": True})
