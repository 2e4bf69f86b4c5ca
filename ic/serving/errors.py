"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

INVALID = "invalid_request_error"
# nginx's number for a client that did not wait; it shows in metrics and logs alone.
CLIENT_GONE = 499


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of HTTP.
        message: one sentence or two for the client's user.
        type: OpenAI's word for the kind of error.
        param: the field of the request that is at fault, if one is.
        code: a word for programs, if there is one.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def unauthorized() -> ApiError:
    """For who sends no token, or another one."""
    return ApiError(
        401,
        "Incorrect or missing API key: send the header 'Authorization: Bearer TOKEN'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be answered as it is: status 400."""
    return ApiError(400, message, param=param, code=code)


def too_many(limit: int) -> ApiError:
    """More answers are in work than the server takes: status 429."""
    return ApiError(
        429,
        f"The server has {limit} answers in work, which is as many as it takes. Ask again later.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": "1"},
    )


def shutting_down() -> ApiError:
    """The server was told to end: status 503."""
    return ApiError(
        503,
        "The server is shutting down. Ask again later, or ask another one.",
        type="server_error",
        code="server_shutting_down",
        headers={"retry-after": "10", "connection": "close"},
    )


def timed_out(seconds: float) -> ApiError:
    """An answer took too long: status 504."""
    return ApiError(
        504,
        f"The answer was not finished within {seconds:g} seconds, the server's limit. Ask for "
        "fewer tokens.",
        type="timeout_error",
        code="timeout",
    )


def failed(message: str = "The server had an error while it answered.") -> ApiError:
    """The server's own fault: status 500."""
    return ApiError(500, message, type="server_error", code="internal_error")
