"""The router between real servers: who answers whom, and what becomes of servers that fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ic.files.json_lines import read_rows
from ic.serving.ab.options import (
    GuardrailOptions,
    HealthOptions,
    RouteOptions,
    RouterLimits,
    VersionOptions,
)
from tests.serving.ab.backend import PIECES, Behaviour, Routed, nobody, routed, server

TOKEN = "a-token-of-sixteen-or-more"
pytestmark = pytest.mark.router
# Never asked after their health again, and never ejected, but where a test says so.
CALM = {"every_s": 3600.0, "eject_after": 10**6}
NO_GUARDRAIL = GuardrailOptions(max_error_share=None, max_slow_share=None)


@contextmanager
def two(
    folder: Path,
    *,
    weights: tuple[float, float] = (50, 50),
    token: str | None = None,
    canary: str | None = None,
    health: dict[str, Any] | None = None,
    guardrail: GuardrailOptions = NO_GUARDRAIL,
    limits: dict[str, Any] | None = None,
) -> Iterator[tuple[Routed, Behaviour, Behaviour]]:
    """A router over a stable and a canary server."""
    with ExitStack() as stack:
        a = stack.enter_context(server(Behaviour("stable")))
        b = stack.enter_context(server(Behaviour("canary")))
        options = RouteOptions(
            versions={
                "stable": VersionOptions([a.url], weights[0]),
                "canary": VersionOptions([canary or b.url], weights[1]),
            },
            port=0,
            output=str(folder),
            health=HealthOptions(**{**CALM, **(health or {})}),
            guardrail=guardrail,
            limits=RouterLimits(**(limits or {})),
        )
        yield stack.enter_context(routed(options, token)), a, b


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "outcomes.jsonl") if row["what"] == "outcome"]


def test_users_are_split_and_stay(tmp_path: Path) -> None:
    with two(tmp_path, weights=(70, 30)) as (router, a, b):
        first = [router.complete(f"user {n}") for n in range(100)]
        again = [router.complete(f"user {n}") for n in range(100)]
        by_header = [
            router.http.post("/v1/completions", json={}, headers={"x-user-id": f"user {n}"})
            for n in range(100)
        ]
    by = [answer.json()["by"] for answer in first]
    assert by == [answer.json()["by"] for answer in again]
    assert by == [answer.json()["by"] for answer in by_header]
    assert by == [answer.headers["x-ic-version"] for answer in first]
    assert 10 <= by.count("canary") <= 55  # 30 are expected
    assert a.asked + b.asked == 300
    rows = outcomes(tmp_path)
    assert len(rows) == 300
    assert len({row["user"] for row in rows}) == 100
    assert [row["version"] for row in rows[:100]] == by
    assert all(row["ok"] and row["seconds"] >= row["first_byte_s"] > 0 for row in rows)
    assert {row["id"] for row in rows} >= {answer.headers["x-ic-id"] for answer in first}
    assert "user 7" not in (tmp_path / "outcomes.jsonl").read_text()


def test_requests_without_a_user_are_split_one_by_one(tmp_path: Path) -> None:
    with two(tmp_path) as (router, _, _):
        by = [router.complete().headers["x-ic-version"] for _ in range(60)]
    assert 5 < by.count("canary") < 55


@pytest.mark.parametrize("mode", ["error", "reset", "nobody", "flap", "busy", "hang"])
def test_who_fails_costs_no_request(tmp_path: Path, mode: str) -> None:
    """Whatever the canary does before its first byte, its users are answered by the other."""
    limits = {"first_byte_s": 0.2} if mode == "hang" else {}
    gone = nobody() if mode == "nobody" else None
    users = 10 if mode == "hang" else 40
    with two(tmp_path, canary=gone, limits=limits) as (router, _, b):
        b.mode = mode
        answers = [router.complete(f"user {n}") for n in range(users)]
        metrics = router.metrics()
    assert {answer.status_code for answer in answers} == {200}
    rows = outcomes(tmp_path)
    of_canary = [row for row in rows if row["version"] == "canary"]
    assert of_canary
    failed = [row for row in of_canary if not row["ok"]]
    if mode == "flap":
        assert len(failed) == (len(of_canary) + 1) // 2
    else:
        assert len(failed) == len(of_canary)
        assert {row["served_by"] for row in rows} == {"stable"}
    assert metrics['ic_router_retries_total{version="canary"}'] == len(failed)
    stable = metrics['ic_router_requests_total{code="200",version="stable"}']
    assert stable == sum(row["served_by"] == "stable" for row in rows)


def test_when_all_fail_the_client_gets_the_last_error(tmp_path: Path) -> None:
    with two(tmp_path) as (router, a, b):
        a.mode = b.mode = "error"
        answer = router.complete("me")
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "broken")
        a.mode = b.mode = "reset"
        answer = router.complete("me")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_server_answers")
    assert [row["ok"] for row in outcomes(tmp_path)] == [False, False]


def test_a_fault_of_the_client_is_passed_on_and_says_nothing(tmp_path: Path) -> None:
    with two(tmp_path) as (router, a, b):
        answer = router.complete("me", bad=True)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no such field")
    assert a.asked + b.asked == 1
    assert outcomes(tmp_path)[0]["ok"] is None


def test_a_stream_is_passed_on_piece_by_piece(tmp_path: Path) -> None:
    """The next piece is made only when the one before has arrived."""
    with two(tmp_path) as (router, a, b):
        a.paced = b.paced = True
        body = {"stream": True, "user": "me"}
        with router.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = answer.headers["x-ic-version"]
            lines = answer.iter_lines()
            for n in range(PIECES):
                assert [next(lines), next(lines)] == [f"data: {name} {n}", ""]
                (a if name == "stable" else b).release.release()
            assert list(lines) == []


def test_a_client_that_goes_ends_the_request(tmp_path: Path) -> None:
    with two(tmp_path) as (router, a, b):
        a.paced = b.paced = True
        body = {"stream": True, "user": "me"}
        with router.http.stream("POST", "/v1/completions", json=body) as answer:
            name = answer.headers["x-ic-version"]
            next(answer.iter_lines())
        assert (a if name == "stable" else b).left.wait(60)
        a.mode = b.mode = "hang"
        a.left.clear()
        b.left.clear()
        with pytest.raises(httpx2.ReadTimeout):
            router.http.post("/v1/completions", json={"user": "me"}, timeout=0.3)
        assert (a if name == "stable" else b).left.wait(60)
    rows = outcomes(tmp_path)
    assert [(row["status"], row["ok"]) for row in rows] == [(499, None), (499, None)]


def test_a_stream_that_breaks_says_so_and_is_not_begun_again(tmp_path: Path) -> None:
    with two(tmp_path) as (router, a, b):
        a.mode = b.mode = "broken"
        answer = router.complete("me", stream=True)
    events = [line for line in answer.text.split("\n\n") if line]
    assert len(events) == 4
    assert json.loads(events[2].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert events[3] == "data: [DONE]"
    assert a.asked + b.asked == 1
    assert outcomes(tmp_path)[0]["ok"] is False


def test_a_server_that_fails_is_left_alone_and_tried_again(tmp_path: Path) -> None:
    health = {"eject_after": 3, "eject_s": 3600.0, "longest_eject_s": 3600.0}
    with two(tmp_path, weights=(0, 100), health=health) as (router, _, b):
        b.mode = "error"
        for n in range(10):
            assert router.complete(f"user {n}").json()["by"] == "stable"
        assert b.asked == 3
        assert router.metrics()['ic_router_healthy{version="canary"}'] == 0
    health["eject_s"] = 0.05
    with two(tmp_path / "b", weights=(0, 100), health=health) as (router, _, b):
        b.mode = "error"
        for n in range(3):
            router.complete(f"user {n}")
        b.mode = "well"
        while router.complete("user").json()["by"] != "canary":
            pass
        assert router.metrics()['ic_router_healthy{version="canary"}'] == 1


def test_an_ill_server_gets_nothing_until_it_is_well(tmp_path: Path) -> None:
    with two(tmp_path, weights=(0, 100), health={"every_s": 0.02}) as (router, _, b):
        b.ill = True
        while router.complete("user").json()["by"] == "canary":
            pass
        before = b.asked
        assert router.versions(10) == {"stable": 10}
        assert b.asked == before
        b.ill = False
        while router.complete("user").json()["by"] == "stable":
            pass


def test_the_token_is_asked_for_passed_on_and_never_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with two(tmp_path, token=TOKEN) as (router, a, b):
        assert router.complete("me").status_code == 200
        seen = (a.seen + b.seen)[0]
        assert seen["authorization"] == f"Bearer {TOKEN}"
        assert seen["host"] in (a.url + b.url)
        for route in ("/v1/models", "/metrics", "/ab"):
            assert httpx2.get(router.url + route).status_code == 401
        wrong = {"authorization": f"Bearer {TOKEN}x"}
        answer = httpx2.post(f"{router.url}/v1/completions", json={}, headers=wrong)
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{router.url}/health").status_code == 200
        metrics = router.metrics()
    assert a.asked + b.asked == 1
    assert metrics['ic_router_requests_total{code="401",version="none"}'] == 2
    told = capfd.readouterr()
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert TOKEN not in told.out + told.err + written


def test_limits(tmp_path: Path) -> None:
    limits = {"body_bytes": 1000, "requests": 1}
    with two(tmp_path, limits=limits) as (router, a, b):
        answer = router.complete("x" * 1000)
        assert answer.json()["error"]["code"] == "request_too_large"
        a.paced = b.paced = True
        with router.http.stream("POST", "/v1/completions", json={"stream": True}):
            answer = router.complete("other")
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert httpx2.get(router.url, headers={"host": "evil"}).status_code == 403
        assert router.http.get("/v2/none").status_code == 404


def test_feedback(tmp_path: Path) -> None:
    with two(tmp_path) as (router, _, _):
        id = router.complete("me").headers["x-ic-id"]
        assert router.http.post("/ab/feedback", json={"id": id, "score": 0.5}).status_code == 200
        for body, param in (
            ({"id": id}, None),
            ({"id": id, "score": 2}, "score"),
            ({"id": id, "score": True}, "score"),
            ({"id": "../x", "score": 1}, "id"),
        ):
            refused = router.http.post("/ab/feedback", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    rows = [row for row in read_rows(tmp_path / "outcomes.jsonl") if row["what"] == "feedback"]
    assert [(row["id"], row["score"]) for row in rows] == [(id, 0.5)]


def test_many_write_whole_lines(tmp_path: Path) -> None:
    with two(tmp_path) as (router, _, _):

        def ask(n: int) -> None:
            with httpx2.Client(base_url=router.url, timeout=60) as http:
                for k in range(10):
                    assert http.post("/v1/completions", json={"user": f"{n}-{k}"}).is_success

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outcomes(tmp_path)) == 80
