"""One request on its way: server after server until one answers, and its answer piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx2
from starlette.requests import Request

from ic.serving.ab.backends import Backend
from ic.serving.ab.options import RouterLimits
from ic.serving.errors import ApiError

# Of one connection, not of the message (RFC 9110, section 7.6.1); httpx and uvicorn set their own.
_OF_THE_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
        "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect",
    }
)  # fmt: skip
# With these another server may do better. 429 is one that has no place, which is no failure of it.
_BUSY = 429
_FAILED = frozenset({500, 502, 503, 504})


class BrokenAnswerError(Exception):
    """The server went away in the middle of its answer."""


def nobody_answers() -> ApiError:
    """No server of any version answered: status 503."""
    return ApiError(
        503,
        "No server of this model answers. Ask again later.",
        type="server_error",
        code="no_server_answers",
        headers={"retry-after": "5"},
    )


@dataclass
class Begun:
    """An answer whose first piece has come.

    Attributes:
        backend: who answers.
        headers: to pass on.
        first: the first piece of the body.
    """

    backend: Backend
    status: int
    headers: list[tuple[bytes, bytes]]
    first: bytes
    _response: httpx2.Response
    _pieces: AsyncIterator[bytes]
    _open: bool = True

    async def rest(self) -> AsyncIterator[bytes]:
        """The other pieces, as they come.

        Raises:
            BrokenAnswerError: the server has gone.
        """
        try:
            async for piece in self._pieces:
                yield piece
        except httpx2.HTTPError as error:
            self.backend.failed()
            raise BrokenAnswerError from error
        if self.status not in _FAILED and self.status != _BUSY:
            self.backend.answered()

    async def close(self) -> None:
        """Hang up, whether or not all of it has come."""
        if self._open:
            self._open = False
            self.backend.in_flight -= 1
            await self._response.aclose()


class Forwarder:
    """Asks servers.

    Args:
        http: without time limits of its own.
    """

    def __init__(self, http: httpx2.AsyncClient, limits: RouterLimits) -> None:
        self._http = http
        self._limits = limits

    async def ask(
        self,
        request: Request,
        body: bytes,
        backends: Sequence[Backend],
        failed: Callable[[str], None],
    ) -> Begun:
        """The first answer that is none of failure; of the last server any answer at all.

        Nothing has been sent to the client so far, so that asking another server does no harm.

        Args:
            backends: in the order in which they are asked, each once.
            failed: told the version of each that fails.

        Raises:
            ApiError: none answers.
        """
        for place, backend in enumerate(backends):
            begun = await self._begin(request, body, backend)
            last = place == len(backends) - 1
            if begun is None or begun.status in _FAILED:
                backend.failed()
            if begun is not None:
                if last or begun.status not in _FAILED | {_BUSY}:
                    return begun
                await begun.close()
            failed(backend.version)
        raise nobody_answers()

    async def _begin(self, request: Request, body: bytes, backend: Backend) -> Begun | None:
        """The answer of one server, once its first piece has come; None if it fails before."""
        query = f"?{request.url.query}" if request.url.query else ""
        asked = self._http.build_request(
            request.method,
            f"{backend.url}{request.url.path}{query}",
            headers=passed_on(request.headers),
            content=body or None,
        )
        backend.in_flight += 1
        response = None
        try:
            async with asyncio.timeout(self._limits.first_byte_s):
                response = await self._http.send(asked, stream=True)
                pieces = response.aiter_raw()
                first = await anext(pieces, b"")
        except (httpx2.HTTPError, TimeoutError, OSError):
            await self._hang_up(backend, response)
            return None
        except BaseException:  # the client has gone, or the time is over
            await self._hang_up(backend, response)
            raise
        return Begun(
            backend,
            response.status_code,
            [
                (name.lower(), value)
                for name, value in response.headers.raw
                if name.decode("latin-1").lower() not in _OF_THE_HOP - {"content-length"}
            ],
            first,
            response,
            pieces,
        )

    async def _hang_up(self, backend: Backend, response: httpx2.Response | None) -> None:
        backend.in_flight -= 1
        if response is not None:
            await response.aclose()


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of a request that the server gets: all but those of the connection. The client's
    token is one of them.
    """
    return {name: value for name, value in headers.items() if name.lower() not in _OF_THE_HOP}
