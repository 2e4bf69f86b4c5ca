"""Errors of an application as responses in OpenAI's form."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ic.serving.errors import ApiError, failed


def answer_errors(app: Starlette) -> None:
    """Have an application answer its own errors, the router's and unforeseen ones."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: no such route, or another method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    told = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return await _api_error(request, told)


async def _unforeseen(request: Request, error: Exception) -> Response:
    """The server's log has the traceback."""
    return await _api_error(request, failed())
