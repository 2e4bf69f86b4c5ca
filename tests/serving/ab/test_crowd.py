"""Two hundred clients on servers of which one fails, one is slow and one flaps."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import httpx2
import openai
import pytest

from ic.files.json_lines import read_rows
from ic.serving.ab.options import GuardrailOptions, HealthOptions, RouteOptions, VersionOptions
from tests.serving.ab.backend import Behaviour, routed, server
from tests.serving.served import NAME, served

pytestmark = pytest.mark.router
CLIENTS, REQUESTS = 200, 3
# Longer than a burst of all clients takes in this one process on a busy machine.
SLOW_S = 20.0
# Outcomes until a version that fails them all is rolled back, at a level that three versions share.
# Of one that fails every other request so many failures: requests that come at once end out of
# order, those that another server answers last.
MOST_OF_ALL, MOST_FAILURES = 5, 12


async def crowd(url: str, go_on: threading.Event) -> Counter[str]:
    """Each asks several times, half of them for streams -> how they ended.

    Args:
        go_on: set, so that the slow version answers, once that one is rolled back.
    """
    ended: Counter[str] = Counter()

    async def client(number: int) -> None:
        for n in range(REQUESTS):
            body = {"user": f"user {number}", "stream": number % 2 == 0, "n": n}
            try:
                answer = await http.post("/v1/completions", json=body)
            except httpx2.HTTPError as error:
                ended[type(error).__name__] += 1
                continue
            whole = "4\n\n" in answer.text if body["stream"] else "by" in answer.json()
            ended[f"{answer.status_code} {'whole' if whole else 'cut'}"] += 1

    limits = httpx2.Limits(max_connections=None)
    async with (
        httpx2.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as http,
        asyncio.TaskGroup() as group,
    ):
        for number in range(CLIENTS):
            group.create_task(client(number))
        while "slow" not in (await http.get("/ab")).json()["rolled_back"]:
            await asyncio.sleep(0.1)
        go_on.set()
    return ended


def test_no_request_is_lost_and_bad_versions_are_rolled_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        modes = {"stable": "well", "failing": "error", "slow": "wait", "flapping": "flap"}
        servers = {
            name: stack.enter_context(server(Behaviour(name, mode))) for name, mode in modes.items()
        }
        options = RouteOptions(
            versions={name: VersionOptions([each.url], 25) for name, each in servers.items()},
            control="stable",
            port=0,
            output=str(tmp_path),
            guardrail=GuardrailOptions(slow_s=SLOW_S),
            # Guardrails alone are to take them out.
            health=HealthOptions(every_s=3600, eject_after=10**6),
        )
        router = stack.enter_context(routed(options))
        ended = asyncio.run(crowd(router.url, servers["slow"].go_on))
        state, metrics = router.state(), router.metrics()
    assert ended == {"200 whole": CLIENTS * REQUESTS}
    assert set(state["rolled_back"]) == {"failing", "slow", "flapping"}
    assert [state["versions"][name]["weight"] for name in modes] == [100, 0, 0, 0]
    assert sum(metrics[f'ic_router_rollbacks_total{{version="{name}"}}'] for name in modes) == 3

    rows = read_rows(tmp_path / "outcomes.jsonl")
    outcomes = [row for row in rows if row["what"] == "outcome"]
    assert len(outcomes) == CLIENTS * REQUESTS
    for version, failures, most in (
        ("failing", MOST_OF_ALL, MOST_OF_ALL),
        ("flapping", MOST_FAILURES, len(outcomes)),
    ):
        told = next(row for row in rows if version in (row.get("rolled_back") or {}))
        before = [row for row in rows[: rows.index(told)] if row.get("version") == version]
        # The outcome that decides is logged behind the change that it makes.
        assert len(before) + 1 <= most
        assert sum(not row["ok"] for row in before) + 1 <= failures
    # The slow one is found by time alone: before any of its requests has come to an end.
    told = next(row for row in rows if "slow" in (row.get("rolled_back") or {}))
    assert "slow answers" in told["rolled_back"]["slow"]
    assert all(row.get("version") != "slow" for row in rows[: rows.index(told)])


def test_our_engine_behind_the_router(folder: Path, tmp_path: Path) -> None:
    """Asked with OpenAI's client: answers are the engine's own, whole and streamed."""
    with ExitStack() as stack:
        engines = [stack.enter_context(served(folder)) for _ in range(2)]
        options = RouteOptions(
            versions={
                name: VersionOptions([engine.url], 50)
                for name, engine in zip(("a", "b"), engines, strict=True)
            },
            port=0,
            output=str(tmp_path),
        )
        router = stack.enter_context(routed(options))
        asked = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
        body = {"model": NAME, "prompt": "The key", "temperature": 0.0, "max_tokens": 8}
        own = engines[0].complete(max_tokens=8).json()["choices"][0]["text"]
        for n in range(6):
            assert asked.completions.create(**body, user=f"{n}").choices[0].text == own
            stream = asked.completions.create(**body, user=f"{n}", stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == own
        with pytest.raises(openai.BadRequestError, match="temperature"):
            asked.completions.create(**{**body, "temperature": 9.0})
        assert [model.id for model in asked.models.list()] == [NAME]
    rows = [row for row in read_rows(tmp_path / "outcomes.jsonl") if row["what"] == "outcome"]
    assert [row["ok"] for row in rows] == [True] * 12 + [None]
    assert {row["version"] for row in rows} == {"a", "b"}
