"""The body of a request, within the limits of a server."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from ic.serving.errors import ApiError


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body of a request.

    Args:
        limit: bytes that it has at most.
        seconds: in which it arrives.

    Raises:
        ApiError: it is too large, or does not arrive in time.
        ClientDisconnect: the client has gone.
    """
    too_large = ApiError(
        413,
        f"The body of the request is larger than {limit} bytes, the server's limit.",
        code="request_too_large",
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                found += piece
                if len(found) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"The request did not arrive within {seconds:g} seconds.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    return bytes(found)
