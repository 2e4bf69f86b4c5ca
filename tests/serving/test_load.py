"""Two hundred clients at once: each gets its answer or its error, and no page is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from ic.model.byte_tokenizer import ByteTokenizer
from ic.serving.options import LimitOptions
from tests.serving.crowd import BROKEN, NEW_TOKENS, PROMPTS, Crowd
from tests.serving.served import greedy, process, served

TOKEN = "a-token-of-sixteen-or-more"
CLIENTS = 200
BODY_BYTES = 20_000
ANSWERED = Counter(
    {
        ("whole", "right"): 20,
        ("stream", "right"): 20,
        ("several", "right"): 20,
        ("read_slowly", "right"): 20,
        ("leave", "left"): 20,
        ("leave_unanswered", "left"): 20,
        ("too_large", "413 request_too_large"): 20,
        ("malformed", "400 None"): 20,
        ("unauthorised", "401 invalid_api_key"): 20,
        ("out_of_range", "400 context_length_exceeded"): 20,
    }
)


def expected_answers(folder: Path) -> list[str]:
    tokenizer = ByteTokenizer()
    answers = [greedy(folder, tokenizer(prompt)["input_ids"], NEW_TOKENS) for prompt in PROMPTS]
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


@pytest.mark.slow
def test_all_are_answered(folder: Path) -> None:
    expected = expected_answers(folder)
    limits = LimitOptions(body_bytes=BODY_BYTES, requests=400)
    with served(folder, token=TOKEN, limits=limits) as found:
        crowd = Crowd(found.url, TOKEN, expected, BODY_BYTES)
        asyncio.run(crowd.run(CLIENTS))
        metrics = found.wait_until_idle()
    assert crowd.outcomes == ANSWERED
    reasons = {
        r: metrics[f'ic:request_success_total{{finished_reason="{r}"}}'] for r in ("abort", "error")
    }
    assert reasons["error"] == 0
    assert reasons["abort"] >= 20  # those that went while they were answered


def test_those_for_whom_there_is_no_place_are_told(folder: Path) -> None:
    limits = LimitOptions(body_bytes=BODY_BYTES, requests=12)
    with served(folder, token=TOKEN, limits=limits) as found:
        crowd = Crowd(found.url, TOKEN, expected_answers(folder), BODY_BYTES)
        asyncio.run(crowd.run(CLIENTS))
        found.wait_until_idle()
    ended = Counter(outcome for _, outcome in crowd.outcomes.elements())
    assert ended["429 rate_limit_exceeded"] > 0
    assert ended["right"] > 0
    assert not ended.keys() & {"wrong", "broken connection"}
    assert ended.total() == CLIENTS


@pytest.mark.load
def test_a_server_that_is_killed_again_and_again(folder: Path) -> None:
    """Waves of clients on servers of their own processes, each killed amid its second wave."""
    options = (f"limits.body_bytes={BODY_BYTES}", "limits.requests=400")
    expected, port = expected_answers(folder), 0
    for _ in range(3):
        # At the same address at once, though connections of the one before are not yet forgotten.
        with process(folder, *options, port=port, env={"IC_SERVE_TOKEN": TOKEN}) as (server, found):
            port = int(found.url.rpartition(":")[2])
            calm = Crowd(found.url, TOKEN, expected, BODY_BYTES)
            asyncio.run(calm.run(CLIENTS))
            assert calm.outcomes == ANSWERED
            found.wait_until_idle()
            broken = Crowd(found.url, TOKEN, expected, BODY_BYTES)
            asyncio.run(broken.run_and_kill(CLIENTS, server.kill))
    assert broken.outcomes.total() == CLIENTS
    ends = Counter(outcome for _, outcome in broken.outcomes.elements())
    assert ends[BROKEN] > 0
    assert "wrong" not in ends


@pytest.mark.load
def test_a_server_that_is_told_to_end_amid_a_crowd(folder: Path) -> None:
    """Who is in work is answered, who comes later is told."""
    options = (f"limits.body_bytes={BODY_BYTES}", "limits.requests=400", "limits.drain_s=300")
    with process(folder, *options, env={"IC_SERVE_TOKEN": TOKEN}) as (server, found):
        crowd = Crowd(found.url, TOKEN, expected_answers(folder), BODY_BYTES)
        asyncio.run(crowd.run_and_kill(CLIENTS, server.terminate))
        assert server.wait() == 0
    allowed = {"right", "left", "503 server_shutting_down", BROKEN}
    answers = {"whole", "stream", "several", "read_slowly", "leave", "leave_unanswered"}
    assert {outcome for kind, outcome in crowd.outcomes if kind in answers} <= allowed
    assert crowd.outcomes.total() == CLIENTS
