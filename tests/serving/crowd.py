"""A crowd of clients at once, of every kind, each of which must get an answer or an error."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

PROMPTS = [f"The pass key of house {i} is" for i in range(5)]
NEW_TOKENS = 12
# What a server that was killed leaves a client with.
BROKEN = "broken connection"


@dataclass
class Crowd:
    """Clients of one server.

    Args:
        url: of the server.
        token: what it asks for.
        expected: the greedy answer to each of `PROMPTS`.
        large: bytes of a prompt that is too large.
        copies: how many answers to each of several prompts are asked for at once.

    Attributes:
        outcomes: how often each kind of client ended how.
    """

    url: str
    token: str
    expected: list[str]
    large: int
    copies: int = 2
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _ended: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self, clients: int) -> None:
        """All at once."""
        kinds = [
            self.whole, self.stream, self.several, self.leave, self.leave_unanswered,
            self.read_slowly, self.too_large, self.malformed, self.unauthorised, self.out_of_range,
        ]  # fmt: skip
        headers = {"authorization": f"Bearer {self.token}"}
        slow = asyncio.Barrier(len(range(kinds.index(self.read_slowly), clients, len(kinds))))
        limits = httpx2.Limits(max_connections=None)
        async with (
            httpx2.AsyncClient(
                base_url=self.url, headers=headers, timeout=None, limits=limits
            ) as http,
            asyncio.TaskGroup() as group,
        ):
            for index in range(clients):
                kind = kinds[index % len(kinds)]
                group.create_task(self._note(kind.__name__, kind(http, index, slow)))

    async def _note(self, kind: str, client: Any) -> None:
        try:
            outcome = await client
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.ConnectError):
            outcome = BROKEN
        async with self._ended:
            self.outcomes[kind, outcome] += 1
            self._ended.notify_all()

    async def run_and_kill(self, clients: int, kill: Callable[[], None]) -> None:
        """All at once; their server gets a signal when a third of them have gone."""
        crowd = asyncio.create_task(self.run(clients))
        await self.wait_for(clients // 3)
        kill()
        await crowd

    async def wait_for(self, clients: int) -> None:
        """Until so many have ended."""
        async with self._ended:
            await self._ended.wait_for(lambda: self.outcomes.total() >= clients)

    def _body(self, index: int, **more: Any) -> dict[str, Any]:
        prompt = PROMPTS[index % len(PROMPTS)]
        return {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **more}

    def error(self, response: httpx2.Response) -> str:
        """The status and the code of an error, which has OpenAI's form."""
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
        return f"{response.status_code} {error['code']}"

    async def whole(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        response = await http.post("/v1/completions", json=self._body(index))
        if response.status_code != 200:
            return self.error(response)
        right = response.json()["choices"][0]["text"] == self.expected[index % len(PROMPTS)]
        return "right" if right else "wrong"

    async def several(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        response = await http.post(
            "/v1/completions", json=self._body(index, prompt=PROMPTS, n=self.copies)
        )
        if response.status_code != 200:
            return self.error(response)
        texts = [choice["text"] for choice in response.json()["choices"]]
        expected = [text for text in self.expected for _ in range(self.copies)]
        return "right" if texts == expected else "wrong"

    async def stream(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        return await self._stream(http, index, None)

    async def read_slowly(self, http: httpx2.AsyncClient, index: int, slow: asyncio.Barrier) -> str:
        """Reads nothing before all others of its kind are answered."""
        return await self._stream(http, index, slow)

    async def _stream(
        self, http: httpx2.AsyncClient, index: int, slow: asyncio.Barrier | None
    ) -> str:
        try:
            body = self._body(index, stream=True)
            async with http.stream("POST", "/v1/completions", json=body) as response:
                waited, slow = slow, None
                if waited is not None:
                    with suppress(asyncio.BrokenBarrierError):
                        await waited.wait()
                if response.status_code != 200:
                    await response.aread()
                    return self.error(response)
                lines = [line async for line in response.aiter_lines() if line]
        finally:
            if slow is not None:  # those that wait for this one go on
                await slow.abort()
        events = [line.removeprefix("data: ") for line in lines]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        if "error" in chunks[-1]:
            return f"stream {chunks[-1]['error']['code']}"
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return "right" if text == self.expected[index % len(PROMPTS)] else "wrong"

    async def leave(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        """Goes after the first piece of a long answer."""
        body = self._body(index, stream=True, max_tokens=2000, ignore_eos=True)
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return self.error(response)
            async for _line in response.aiter_lines():
                break
        return "left"

    async def leave_unanswered(
        self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier
    ) -> str:
        """Goes while a long answer is made."""
        body = self._body(index, max_tokens=2000, ignore_eos=True)
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        try:
            await http.get("/health")
        finally:
            asking.cancel()
        try:
            return self.error(await asking)
        except asyncio.CancelledError:
            return "left"

    async def too_large(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        return self.error(
            await http.post("/v1/completions", json=self._body(index, prompt="x" * self.large))
        )

    async def malformed(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        headers = {"content-type": "application/json"}
        return self.error(
            await http.post("/v1/chat/completions", content=b'{"messages": [', headers=headers)
        )

    async def unauthorised(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        headers = {"authorization": f"Bearer {self.token[::-1]}"}
        return self.error(
            await http.post("/v1/completions", json=self._body(index), headers=headers)
        )

    async def out_of_range(self, http: httpx2.AsyncClient, index: int, _: asyncio.Barrier) -> str:
        return self.error(
            await http.post("/v1/completions", json=self._body(index, max_tokens=10**9))
        )
