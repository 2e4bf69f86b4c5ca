"""A server of uvicorn's that ends without losing an answer."""

from __future__ import annotations

import signal
import socket
import time
from types import FrameType

import uvicorn

from ic.serving.admission import Admission

# After the answers in work were given up, until their errors are sent.
LAST_WORDS_S = 5


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
        return self._admission.in_work == 0 or late_s > LAST_WORDS_S
