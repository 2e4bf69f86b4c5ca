"""The router's answer to a request: a version for its user, and a line in the log of what came."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ic.serving.ab.backends import Backends
from ic.serving.ab.experiment import Experiment
from ic.serving.ab.forwarding import Begun, BrokenAnswerError, Forwarder
from ic.serving.ab.metrics import NO_VERSION, RouterMetrics
from ic.serving.ab.options import RouteOptions
from ic.serving.admission import Admission
from ic.serving.bodies import read_body
from ic.serving.connection import ABORT
from ic.serving.errors import CLIENT_GONE, ApiError, ClientGoneError, failed
from ic.serving.supervision import Supervision

# On each answer: who gave it, and what feedback refers to.
VERSION_HEADER, ID_HEADER = "x-ic-version", "x-ic-id"
_LONGEST_USER = 1024
_LAST_EVENT = b"data: [DONE]\n\n"


@dataclass
class _Outcome:
    """What is known of a request so far.

    Attributes:
        version: that the user has.
        served_by: that answered.
        measured: whether it tells something of a version: a list of models does not.
        ok: whether the user's own version answered; None where that says nothing of it.
    """

    id: str
    user: str
    version: str
    route: str
    measured: bool
    began: float
    served_by: str | None = None
    status: int = 0
    first_byte_s: float | None = None
    ok: bool | None = None
    was_slow: bool = False


class Router:
    """Forwards requests within the limits, and tells the experiment what came of them."""

    def __init__(
        self,
        options: RouteOptions,
        experiment: Experiment,
        backends: Backends,
        forwarder: Forwarder,
        metrics: RouterMetrics,
    ) -> None:
        self.admission = Admission(options.limits.requests)
        self._options = options
        self._experiment = experiment
        self._backends = backends
        self._forwarder = forwarder
        self._metrics = metrics

    async def forward(self, request: Request) -> Response:
        """The answer of a server, as it comes.

        Raises:
            ApiError: what the client is told instead.
        """
        limits = self._options.limits
        async with AsyncExitStack() as held:
            place = self.admission.enter()
            held.callback(place.leave)
            place.widen(1)
            try:
                body = await read_body(request, limits.body_bytes, limits.read_s)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            outcome = self._outcome(request, body)
            held.callback(self._ended, outcome)
            supervised = Supervision(request.receive, self.admission.stopping, limits.answer_s)
            late = asyncio.get_running_loop().call_later(
                self._options.guardrail.slow_s, self._is_slow, outcome
            )
            held.callback(late.cancel)
            try:
                begun = await supervised(self._begin(request, body, outcome))
            except ClientGoneError:
                outcome.status, outcome.ok = CLIENT_GONE, None
                return Response(status_code=CLIENT_GONE, headers=self._headers(outcome))
            except ApiError as error:
                outcome.status, outcome.ok = error.status, False
                raise
            late.cancel()
            held.push_async_callback(begun.close)
            return _Passing(begun, self._headers(outcome), outcome, supervised, held.pop_all())

    def _outcome(self, request: Request, body: bytes) -> _Outcome:
        given = request.headers.get(self._options.user_header) or _user_in(body)
        user = given[:_LONGEST_USER] if given else uuid.uuid4().hex  # each request for itself
        version = self._experiment.version_of(user)
        measured = request.method == "POST"
        name = self._experiment.name_of(user)
        path = request.url.path
        return _Outcome(uuid.uuid4().hex, name, version, path, measured, time.perf_counter())

    async def _begin(self, request: Request, body: bytes, outcome: _Outcome) -> Begun:
        order = self._backends.in_order(outcome.version, self._experiment.control)
        begun = await self._forwarder.ask(request, body, order, self._metrics.retried)
        outcome.first_byte_s = time.perf_counter() - outcome.began
        outcome.served_by, outcome.status = begun.backend.version, begun.status
        if begun.status >= 500 or begun.status == 429 or begun.backend.version != outcome.version:
            outcome.ok = False
        else:
            outcome.ok = True if begun.status < 400 else None
        return begun

    def _headers(self, outcome: _Outcome) -> dict[str, str]:
        return {VERSION_HEADER: outcome.served_by or outcome.version, ID_HEADER: outcome.id}

    def _is_slow(self, outcome: _Outcome) -> None:
        """Its time is over: a version that hangs is found before its requests have ended."""
        outcome.was_slow = True
        if outcome.measured:
            self._experiment.observe(outcome.version, failed=None, slow=True)

    def _ended(self, outcome: _Outcome) -> None:
        seconds = time.perf_counter() - outcome.began
        self._metrics.took(outcome.served_by or NO_VERSION, seconds)
        if not outcome.measured:
            return
        in_time = outcome.ok and not outcome.was_slow
        self._experiment.observe(
            outcome.version,
            failed=None if outcome.ok is None else not outcome.ok,
            slow=False if in_time else None,  # a slow one is counted already
        )
        self._experiment.log(
            what="outcome",
            id=outcome.id,
            user=outcome.user,
            version=outcome.version,
            served_by=outcome.served_by,
            ok=outcome.ok,
            status=outcome.status,
            first_byte_s=_rounded(outcome.first_byte_s),
            seconds=_rounded(seconds),
            route=outcome.route,
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _user_in(body: bytes) -> str | None:
    """OpenAI's field `user`; None where there is none, or no JSON, which the server will refuse."""
    try:
        found: Any = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None
    user = found.get("user") if isinstance(found, dict) else None
    return user if isinstance(user, str) and user else None


class _Passing(Response):
    """Sends pieces on as they come; nothing is kept.

    Args:
        held: what the request holds, given back when the answer ends in any way.
    """

    def __init__(
        self,
        begun: Begun,
        headers: dict[str, str],
        outcome: _Outcome,
        supervised: Supervision,
        held: AsyncExitStack,
    ) -> None:
        self.status_code = begun.status
        self.background = None
        own = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.raw_headers = [*begun.headers, *own]
        self._begun = begun
        self._outcome = outcome
        self._supervised = supervised
        self._held = held
        self._sent = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            try:
                await self._supervised(self._send_all(send))
            except ClientGoneError:
                # OpenAI's client hangs up as soon as it has read the last event.
                if not self._sent.endswith(_LAST_EVENT):
                    self._outcome.status = CLIENT_GONE
                    if self._outcome.ok:  # nor did the version fail
                        self._outcome.ok = None
                return
            except BrokenAnswerError:
                self._outcome.ok = False
                await self._give_up(scope, send, failed("The server broke off its answer."))
                return
            except ApiError as error:
                await self._give_up(scope, send, error)
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await self._send(send, self._begun.first)
        async for piece in self._begun.rest():
            await self._send(send, piece)

    async def _send(self, send: Send, piece: bytes) -> None:
        if piece:
            self._sent = (self._sent + piece)[-len(_LAST_EVENT) :]
            await send({"type": "http.response.body", "body": piece, "more_body": True})

    async def _give_up(self, scope: Scope, send: Send, error: ApiError) -> None:
        """The error as an event, where events are sent and none is half sent; else cut off, so that
        nobody takes the piece for the whole.
        """
        kind = dict(self.raw_headers).get(b"content-type", b"")
        if not kind.startswith(b"text/event-stream") or not self._sent.endswith(b"\n\n"):
            scope["state"][ABORT]()
            return
        event = b"data: %b\n\n%b" % (to_json(error.body), _LAST_EVENT)
        await send({"type": "http.response.body", "body": event, "more_body": False})
