"""Servers of a version, real ones on sockets of their own, that fail in the ways that servers do."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ic.serving.ab.app import ready
from ic.serving.ab.options import RouteOptions
from ic.serving.connection import ABORT, connection_class
from ic.serving.listening import listen

PIECES = 5


@dataclass
class Behaviour:
    """What a server does with its requests; may be changed while it runs.

    Attributes:
        name: what it answers with.
        mode: `well`; `error`: status 500; `reset`: hangs up before a byte; `hang`: never answers; `wait`: until
            `go_on` is set;
            `broken`: hangs up in the middle; `flap`: every other request is an error; `busy`: 429.
        ill: whether its health check fails.
        seen: of the requests that came: their headers.
        left: how many clients have gone before the end.
        release: lets streams go on after their first piece, one piece per release.
    """

    name: str
    mode: str = "well"
    ill: bool = False
    seen: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    paced: bool = False
    go_on: threading.Event = field(default_factory=threading.Event)
    release: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    url: str = ""

    @property
    def asked(self) -> int:
        return len(self.seen)

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.seen.append(dict(request.headers))
        self.bodies.append(body)
        mode = self.mode
        if mode == "flap":
            mode = "error" if len(self.seen) % 2 else "well"
        if mode == "error":
            return JSONResponse({"error": {"message": "broken"}}, 500)
        if mode == "busy":
            return JSONResponse({"error": {"message": "busy"}}, 429)
        if mode == "reset":
            request.scope["state"][ABORT]()
            return Response()
        while mode == "wait" and not self.go_on.is_set():
            await asyncio.sleep(0.05)
        if mode == "hang":
            await self._gone(request)
            return Response()
        asked = json.loads(body or b"{}")
        if asked.get("stream"):
            pieces = self._pieces(request, 2 if mode == "broken" else PIECES)
            return StreamingResponse(pieces, media_type="text/event-stream")
        if asked.get("bad"):
            return JSONResponse({"error": {"message": "no such field"}}, 400)
        return JSONResponse({"by": self.name, "user": asked.get("user")})

    async def _gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.left.set()

    async def _pieces(self, request: Request, number: int) -> AsyncIterator[bytes]:
        gone = asyncio.create_task(self._gone(request))
        try:
            for n in range(number):
                while self.paced and n and not self.release.acquire(blocking=False):
                    await asyncio.sleep(0.002)
                yield b"data: %s %d\n\n" % (self.name.encode(), n)
            if number < PIECES:
                request.scope["state"][ABORT]()
        finally:
            gone.cancel()

    async def health(self, request: Request) -> Response:
        return JSONResponse({}, 503 if self.ill else 200)


@contextmanager
def server(behaviour: Behaviour) -> Iterator[Behaviour]:
    """A server on a thread of its own, with the address in `behaviour.url`."""
    app = Starlette(
        routes=[
            Route("/health", behaviour.health),
            Route("/v1/{path:path}", behaviour.answer, methods=["GET", "POST"]),
        ]
    )
    with listen("127.0.0.1", 0) as listening:
        settings = uvicorn.Config(
            app,
            http=connection_class(60, 60),
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        found = uvicorn.Server(settings)
        thread = threading.Thread(target=found.run, kwargs={"sockets": [listening]})
        thread.start()
        behaviour.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            yield behaviour
        finally:
            found.should_exit = True
            thread.join()


def nobody() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@dataclass
class Routed:
    """A router that runs."""

    url: str
    http: httpx2.Client

    def complete(self, user: str | None = None, **body: Any) -> httpx2.Response:
        named = {} if user is None else {"user": user}
        return self.http.post("/v1/completions", json={**named, **body})

    def metrics(self) -> dict[str, float]:
        lines = [
            line.rpartition(" ")
            for line in self.http.get("/metrics").text.splitlines()
            if not line.startswith("#")
        ]
        return {name: float(value) for name, _, value in lines}

    def versions(self, users: int) -> Counter[str]:
        """Who answers so many users."""
        return Counter(self.complete(f"user {n}").headers["x-ic-version"] for n in range(users))

    def state(self) -> dict[str, Any]:
        return dict(self.http.get("/ab").json())


@contextmanager
def routed(options: RouteOptions, token: str | None = None) -> Iterator[Routed]:
    """A router on a thread of this process."""
    with ready(options, token) as found:
        thread = threading.Thread(target=found.serve_clients)
        thread.start()
        url = f"http://127.0.0.1:{found.port}"
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            with httpx2.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
                yield Routed(url, http)
        finally:
            found.handle_exit(signal.SIGTERM, None)
            thread.join()
