"""A server of uvicorn's that ends without losing an answer."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Literal, Protocol

import uvicorn
from starlette.types import ASGIApp

from ic.serving.admission import Admission
from ic.serving.connection import connection_class
from ic.serving.listening import BACKLOG

# After the answers in work were given up, until their errors are sent.
_LAST_WORDS_S = 5


class Limits(Protocol):
    """What a server bears of its clients.

    Attributes:
        read_s: seconds in which a request must have arrived whole.
        write_s: seconds that a client may leave what was sent to it unread.
        drain_s: seconds that answers in work may take after SIGTERM.
    """

    read_s: float
    write_s: float
    drain_s: float


class Server(uvicorn.Server):
    """Ends on SIGTERM and Ctrl-C when the answers in work are finished, up to a limit.

    Attributes:
        interrupted: whether it was Ctrl-C.

    Args:
        listening: the socket that clients connect to.
        greeting: printed once they are answered.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listening: socket.socket,
        admission: Admission,
        drain_s: float,
        greeting: str,
    ) -> None:
        super().__init__(config)
        self.interrupted = False
        self._listening = listening
        self._admission = admission
        self._drain_s = drain_s
        self._greeting = greeting
        self._deadline = 0.0

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    def serve_clients(self) -> None:
        """Run until a signal comes, in the main thread, or `handle_exit` is called."""
        self.run(sockets=[self._listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal takes no further request, the second gives up those in work."""
        self.interrupted |= sig == signal.SIGINT
        again = self._admission.draining
        self._admission.draining = True
        self._deadline = time.monotonic() + (0.0 if again else self._drain_s)

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times per second whether to end."""
        leave = await super().on_tick(counter)
        if not self._admission.draining:
            return leave
        late_s = time.monotonic() - self._deadline
        if late_s >= 0:
            self._admission.stopping.set()
        return self._admission.in_work == 0 or late_s > _LAST_WORDS_S


def build_server(
    app: ASGIApp,
    listening: socket.socket,
    admission: Admission,
    limits: Limits,
    greeting: str,
    token: str | None,
    lifespan: Literal["on", "off"],
    access_log: bool = False,
) -> Server:
    """A server of an application, with the settings that all of ours have.

    Args:
        listening: the socket that clients connect to.
        greeting: what is served where; whether clients send the token is said after it.
        lifespan: whether the application has something to do before and after.
        access_log: print a line per request.
    """
    settings = uvicorn.Config(
        app,
        http=connection_class(limits.read_s, limits.write_s),
        ws="none",
        lifespan=lifespan,
        server_header=False,
        access_log=access_log,
        log_level="info" if access_log else "warning",
        timeout_graceful_shutdown=_LAST_WORDS_S,
        backlog=BACKLOG,
    )
    greeting += "; clients send the token" if token else "; clients send no token"
    return Server(settings, listening, admission, limits.drain_s, greeting)


def serve_until_stopped(ready: AbstractContextManager[Server]) -> int:
    """Serve until SIGTERM or Ctrl-C, and close what the server needed.

    Returns:
        The exit code, 0.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the answers in work are finished.
    """
    with ready as server:
        server.serve_clients()
    if server.interrupted:
        raise KeyboardInterrupt
    return 0
