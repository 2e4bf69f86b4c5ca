"""A connection of uvicorn's that waits for no client longer than it is told to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ic.serving.errors import ApiError, invalid

# Where the state of a request has what cuts its client off.
ABORT = "abort_connection"


def connection_class(read_s: float, write_s: float) -> type[H11Protocol]:
    """The protocol of a server's connections, for `uvicorn.Config(http=...)`.

    Args:
        read_s: seconds in which the head of a request must arrive, and what is left of a body that
            was answered unread.
        write_s: seconds after which a client that takes nothing of what was sent is cut off.
    """

    class Connection(H11Protocol):
        """Cuts off who sends or takes too slowly, and answers nonsense in OpenAI's form."""

        def __init__(
            self,
            config: uvicorn.Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, {**app_state, ABORT: self._abort}, _loop)
            self._reading: asyncio.TimerHandle | None = None
            self._writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            state = self.conn.their_state
            answered = self.cycle is not None and self.cycle.response_complete
            if state is h11.IDLE or (state is h11.SEND_BODY and answered):
                self._expect()
            else:
                self._expect_nothing()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:
                self._expect()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._cut_off_later(self.loop.call_later(write_s, self._abort))

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cut_off_later(None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_nothing()
            self._cut_off_later(None)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(invalid(msg))

        def _expect(self) -> None:
            """Something is to come soon; more of it does not make the time longer."""
            if self._reading is None:
                self._reading = self.loop.call_later(read_s, self._too_slow)

        def _expect_nothing(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
            self._reading = None

        def _cut_off_later(self, timer: asyncio.TimerHandle | None) -> None:
            """Replace the timer that cuts off a client which reads nothing."""
            if self._writing is not None:
                self._writing.cancel()
            self._writing = timer

        def _too_slow(self) -> None:
            if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
                message = f"The request did not arrive within {read_s:g} seconds."
                self._refuse(ApiError(408, message, code="request_timeout"))
            self._abort_if_unsent()

        def _refuse(self, error: ApiError) -> None:
            """Answer what is not yet a request, and close."""
            body = json.dumps(error.body).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _abort_if_unsent(self) -> None:
            """Close; at once where the client takes nothing either."""
            if self.flow.write_paused:
                self._abort()
            else:
                self.transport.close()

        def _abort(self) -> None:
            self.transport.abort()

    return Connection
