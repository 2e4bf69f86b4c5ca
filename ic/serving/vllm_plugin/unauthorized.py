"""Says in OpenAI's form that a token is missing or wrong, which vLLM's server says in its own.

vLLM answers `{"error": "Unauthorized"}` (0.32), in which a client of OpenAI's finds neither
a message nor a code. `--middleware` is vLLM's extension point for what stands around its routes;
`ic.serving.vllm_command` gives it this class.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ic.serving.errors import unauthorized


class OpenAIUnauthorized:
    """ASGI middleware: replaces a response of status 401, whole, by that of our own server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def told(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 401:
                replaced = True
                error = unauthorized()
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            elif not replaced:
                await send(message)

        await self._app(scope, receive, told)
