"""Who answers over HTTP: any server that has OpenAI's route for completions of token ids."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx2

from ic.errors import RunFailedError, UsageError, one_line
from ic.studies.serving.options import ServingBenchmarkOptions
from ic.studies.serving.timing import RequestTimes

_CONNECT_TIMEOUT_S = 10.0


class ServerSide:
    """A server, asked for streams of completions.

    Raises:
        UsageError: nothing answers at the address, it refuses the token, or has no such model.
    """

    def __init__(self, options: ServingBenchmarkOptions) -> None:
        assert options.url is not None
        self._url = options.url.rstrip("/")
        token = os.environ.get(options.token_env, "").strip()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = httpx2.Timeout(
            options.timeout_s, connect=min(options.timeout_s, _CONNECT_TIMEOUT_S)
        )
        self._model = self._find_model(options)

    def answer(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTimes]:
        """When the tokens of each came.

        Raises:
            ValueError: the server refuses the request (400, 413 or 422).
            RunFailedError: it could not be reached any more, or did not answer as such a server.
        """
        return asyncio.run(self._answer(prompts, output_tokens))

    def close(self) -> None:
        """Nothing is kept open between two repetitions."""

    async def _answer(
        self, prompts: Sequence[Sequence[int]], output_tokens: int
    ) -> list[RequestTimes]:
        limits = httpx2.Limits(max_connections=len(prompts))
        async with httpx2.AsyncClient(
            headers=self._headers, timeout=self._timeout, limits=limits
        ) as client:
            asked = [self._stream(client, prompt, output_tokens) for prompt in prompts]
            # All end before the next cell begins, though one fails.
            ended = await asyncio.gather(*asked, return_exceptions=True)
        found: list[RequestTimes] = []
        for each in ended:
            if isinstance(each, BaseException):
                raise each
            found.append(each)
        return found

    async def _stream(
        self, client: httpx2.AsyncClient, prompt: Sequence[int], output_tokens: int
    ) -> RequestTimes:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times = RequestTimes(len(prompt), time.perf_counter())
        usage: dict[str, Any] = {}
        try:
            async with client.stream("POST", f"{self._url}/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._refused(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    chunk = json.loads(line[5:])
                    if "error" in chunk:
                        raise RunFailedError(f"{self._url} ended an answer: {chunk['error']}")
                    if any(choice.get("text") for choice in chunk.get("choices") or ()):
                        times.arrivals.append((time.perf_counter(), 1))
                    usage = chunk.get("usage") or usage
        except (httpx2.HTTPError, json.JSONDecodeError) as error:
            raise RunFailedError(
                f"{self._url}: {one_line(error) or type(error).__name__}"
            ) from None
        return self._counted(times, usage, output_tokens)

    def _counted(
        self, times: RequestTimes, usage: dict[str, Any], output_tokens: int
    ) -> RequestTimes:
        """With the server's own counts: a piece may hold several tokens, or half a character."""
        if len(times.arrivals) < 2:
            raise RunFailedError(
                f"{self._url} sent {len(times.arrivals)} pieces of text for {output_tokens} "
                "tokens: it does not stream, or they spell no text; give another vocab_size or "
                "prompt_file"
            )
        details = usage.get("prompt_tokens_details") or {}
        times.cached_tokens = details.get("cached_tokens") or 0
        times.prompt_tokens = usage.get("prompt_tokens") or times.prompt_tokens
        tokens = usage.get("completion_tokens") or len(times.arrivals)
        share = tokens / len(times.arrivals)
        times.arrivals = [(when, share) for when, _ in times.arrivals]
        return times

    def _refused(self, response: httpx2.Response) -> None:
        said = f"{self._url} answers {response.status_code}: {one_line(response.text[:500])}"
        if response.status_code in (400, 413, 422):
            raise ValueError(said)
        raise RunFailedError(said)

    def _find_model(self, options: ServingBenchmarkOptions) -> str:
        try:
            response = httpx2.get(
                f"{self._url}/models", headers=self._headers, timeout=self._timeout
            )
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise UsageError(
                f"url={options.url}: no server answers there ({one_line(error)}); start it, or "
                "correct the address, which ends in /v1 as a rule"
            ) from None
        if response.status_code in (401, 403):
            raise UsageError(
                f"url={options.url}: the server refuses the token ({response.status_code}); put it "
                f"into the variable {options.token_env} (token_env)"
            )
        try:
            models = [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            models = []
        if options.server_model is None and not models:
            raise UsageError(
                f"url={options.url}: the server lists no models there; correct the address, which "
                "ends in /v1 as a rule, or name its model by "
                "server_model="
            )
        if options.server_model is not None and models and options.server_model not in models:
            raise UsageError.unknown("model", options.server_model, models)
        return options.server_model or models[0]
