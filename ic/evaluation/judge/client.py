"""A client of an OpenAI-compatible server: chat completions, asked again where that may help."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
    wait_exponential_jitter,
)

from ic.errors import RunFailedError, UsageError, one_line
from ic.evaluation.judge.grid import Config
from ic.evaluation.judge.prometheus import Messages

# What a server says of itself or of the moment, not of the request.
_PASSING = {408, 409, 425, 429}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
# The longest that a server's Retry-After is heeded: a quota that lasts longer is worth an error.
_LONGEST_RETRY_AFTER_S = 600.0
_CONNECT_TIMEOUT_S = 10.0


class RefusedError(RunFailedError):
    """The server will not answer this request, however often it is asked."""


class _PassingError(RunFailedError):
    """The server may answer later.

    Attributes:
        retry_after_s: how long the server asks to wait.
    """

    def __init__(self, said: str, retry_after_s: float | None = None) -> None:
        super().__init__(said)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Reply:
    """What the server's model wrote.

    Attributes:
        whole: false where the limit of tokens cut it off.
    """

    text: str
    whole: bool


class JudgeClient:
    """Chat completions from the server of the options; may be called from several threads.

    Args:
        sleep: waits so many seconds between two attempts; by default until `close` is called.

    Raises:
        UsageError: no server or model is named, or the key's variable is not set.
    """

    def __init__(self, config: Config, sleep: Callable[[float], None] | None = None) -> None:
        for name, example in (("url", "http://localhost:8000/v1"), ("model", "prometheus-7b-v2.0")):
            if not getattr(config, name):
                raise UsageError(
                    f"suite.judge.{name}: the judge is not named; give suite.judge.{name}={example}"
                )
        assert config.url is not None
        self.config = config
        self.url = config.url.rstrip("/").removesuffix("/chat/completions")
        self._key = self._read_key()
        self._closed = threading.Event()
        self._sleep = sleep or sleep_using_event(self._closed)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(
                config.timeout_s, connect=min(config.timeout_s, _CONNECT_TIMEOUT_S)
            ),
            limits=httpx2.Limits(max_connections=config.concurrency),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End what waits and what is open; calls that are under way fail."""
        self._closed.set()
        self._http.close()

    def check(self) -> None:
        """Refuse a server that is not there, before anything is computed for it.

        Raises:
            UsageError: nothing answers at the address, it refuses the key, or it lists its models
                and the judge is none of them.
        """
        try:
            response = self._http.get(f"{self.url}/models")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise UsageError(
                f"suite.judge.url={self.config.url}: no judge answers there "
                f"({self._said(error)}); start it, or correct the address"
            ) from None
        if response.status_code in (401, 403):
            raise UsageError(
                f"suite.judge.url={self.config.url}: the server refuses the key "
                f"({response.status_code}); name the variable that holds it by "
                "suite.judge.api_key_env"
            )
        models = _models(response)
        if models and self.config.model not in models:
            assert self.config.model is not None
            unknown = UsageError.unknown("model", self.config.model, models)
            raise UsageError(f"suite.judge.model: {unknown} (of {self.url})")

    def complete(self, messages: Messages, temperature: float | None) -> Reply:
        """The server's answer to a conversation.

        Raises:
            RefusedError: it refuses the request.
            RunFailedError: it could not be reached, or did not answer as such a server does, as
                often as it was tried.
        """
        body: dict[str, Any] = {"model": self.config.model, "messages": messages}
        if temperature is not None:
            body["temperature"] = temperature
        if self.config.max_tokens is not None:
            body["max_tokens"] = self.config.max_tokens
        body |= self.config.request
        return Retrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_any(
                stop_after_attempt(self.config.attempts), stop_when_event_set(self._closed)
            ),
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )(self._post, body)

    def _post(self, body: dict[str, Any]) -> Reply:
        try:
            response = self._http.post(f"{self.url}/chat/completions", json=body)
        except httpx2.HTTPError as error:
            raise _PassingError(f"the judge at {self.url}: {self._said(error)}") from None
        status = response.status_code
        if status == 200:
            return self._reply(response)
        said = f"the judge at {self.url} answers {status}: {self._said(response.text[:500])}"
        if status in _PASSING or status >= 500:
            raise _PassingError(said, _retry_after(response.headers.get("Retry-After")))
        raise RefusedError(said)

    def _reply(self, response: httpx2.Response) -> Reply:
        try:
            (choice,) = response.json()["choices"]
            text = choice["message"]["content"] or ""  # none where all tokens went into thinking
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise _PassingError(
                f"the judge at {self.url} answers no chat completion: "
                f"{self._said(response.text[:200])}"
            ) from None
        return Reply(text, choice.get("finish_reason") != "length")

    def _read_key(self) -> str | None:
        name = self.config.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise UsageError(
                f"suite.judge.api_key_env={name}: no such variable is set; put the server's key "
                "into it, or leave api_key_env out"
            )
        return key

    def _said(self, what: Exception | str) -> str:
        """In one line, without the key, which some servers repeat."""
        text = one_line(what) or type(what).__name__
        return text.replace(self._key, "(key)") if self._key else text


def _models(response: httpx2.Response) -> list[str]:
    """What a server says it serves; nothing where it does not say."""
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _wait(state: RetryCallState) -> float:
    """As long as the server asks for; else 1, 2, 4 s and so on, with a jitter."""
    assert state.outcome is not None
    error = state.outcome.exception()
    if isinstance(error, _PassingError) and error.retry_after_s is not None:
        return min(error.retry_after_s, _LONGEST_RETRY_AFTER_S)
    grows = wait_exponential_jitter(
        multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S, jitter=_FIRST_WAIT_S
    )
    return grows(state)


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After, which is a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else None
