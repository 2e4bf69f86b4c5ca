"""What stands before the routes: who may ask, and the count of what was answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ic.serving.errors import ApiError, unauthorized
from ic.serving.token import Token

if TYPE_CHECKING:
    from collections.abc import Collection

# Whether the server is up may be asked by whoever balances the load; it tells nothing else.
OPEN = "/health"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Responses(Protocol):
    """What counts responses."""

    def response(self, route: str, status: int) -> None: ...


class Guard:
    """ASGI middleware: refuses who has no token, before a byte of the body is read.

    Without a token the server listens to this machine alone. Then pages that a browser shows are
    kept out: they would come by another name of the host (DNS rebinding), or with a type of content
    that a page may send anywhere.

    Args:
        metrics: what counts the responses, if they are counted here.
        routes: paths that are counted by their names; all others are counted together.
    """

    def __init__(
        self, app: ASGIApp, token: Token | None, metrics: Responses | None, routes: Collection[str]
    ) -> None:
        self._app = app
        self._token = token
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and self._metrics is not None:
                self._metrics.response(route, message["status"])
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        """Raises:
        ApiError: 401, 403 or 415.
        """
        headers = Headers(scope=scope)
        if self._token is None:
            host = headers.get("host", "").rpartition(":")
            name = host[0] if host[2].isdigit() else "".join(host)
            if name not in _LOOPBACK:
                raise ApiError(
                    403,
                    f"Without a token this server answers to the names {', '.join(_LOOPBACK)} "
                    f"alone, not to {name!r}.",
                    code="forbidden_host",
                )
        elif scope["path"] != OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self._token.matches(given.strip().encode("latin-1")):
                raise unauthorized()
        content = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content != "application/json":
            raise ApiError(
                415,
                f"The content type is {content!r}: send 'Content-Type: application/json'.",
                code="unsupported_media_type",
            )
