"""What our middleware makes of vLLM's refusal of a token, and of everything else: nothing."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ic.serving.vllm_plugin.unauthorized import OpenAIUnauthorized


async def refused(_: Request) -> Response:
    return JSONResponse({"error": "Unauthorized"}, 401)


async def streamed(_: Request) -> Response:
    return StreamingResponse(iter(["one ", "two"]), 200, {"x-kept": "yes"})


async def forbidden(_: Request) -> Response:
    return JSONResponse({"error": "no"}, 403)


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [("/streamed", 200, "one two"), ("/forbidden", 403, '{"error":"no"}')],
)
def test_other_answers_are_as_they_were(path: str, status: int, text: str) -> None:
    response = asked(path)
    assert (response.status_code, response.text) == (status, text)
    assert ("x-kept" in response.headers) == (path == "/streamed")


def test_a_refusal_is_in_openais_form() -> None:
    response = asked("/refused")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in error["message"]


def asked(path: str) -> httpx2.Response:
    routes = [Route(f"/{view.__name__}", view) for view in (refused, streamed, forbidden)]
    app = OpenAIUnauthorized(Starlette(routes=routes))

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path)

    return asyncio.run(ask())
