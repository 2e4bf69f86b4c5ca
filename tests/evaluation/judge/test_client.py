"""The judge's client and its file of judgements, against a server that misbehaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ic.errors import RunFailedError, UsageError
from ic.evaluation.judge.client import JudgeClient, RefusedError, Reply
from ic.evaluation.judge.grading import Judge, Question
from ic.evaluation.judge.grid import Config
from ic.evaluation.judge.prometheus import parse_score
from ic.files.json_lines import read_rows
from tests.evaluation.judge.server import Answer, Behaviour, Server, completion, judge_server

HELLO = [{"role": "user", "content": "hello"}]
GOOD = "It is fine. [RESULT] 4"


def config(url: str, **options: Any) -> Config:
    return Config(url=url, model="judge", **options)


def in_turn(*answers: Answer) -> Behaviour:
    """The answers one after the other, the last one for ever."""
    return lambda body, number: answers[min(number, len(answers) - 1)]


@contextmanager
def client_of(
    behaviour: Behaviour, waits: list[float], **options: Any
) -> Iterator[tuple[Server, JudgeClient]]:
    """A server that behaves so, and a client of it that notes its waits instead of waiting."""
    with (
        judge_server(behaviour) as server,
        JudgeClient(config(server.url, **options), waits.append) as client,
    ):
        yield server, client


def questions(count: int) -> list[Question]:
    return [
        Question([{"role": "user", "content": f"question {n}"}], parse_score) for n in range(count)
    ]


@pytest.fixture
def waits() -> list[float]:
    return []


def test_a_request_as_openai_s(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    with judge_server(in_turn(GOOD)) as server:
        options = config(server.url + "/", api_key_env="JUDGE_KEY", request={"top_p": 0.9})
        with JudgeClient(options, waits.append) as client:
            client.check()
            assert client.complete(HELLO, 0.0) == Reply(GOOD, True)
        plain = config(server.url, max_tokens=None)
        with JudgeClient(plain, waits.append) as client:
            client.complete(HELLO, None)
    assert server.requests == [
        {"model": "judge", "messages": HELLO, "temperature": 0.0, "max_tokens": 1024, "top_p": 0.9},
        {"model": "judge", "messages": HELLO},
    ]
    assert server.keys == ["Bearer secret-1", None]
    assert waits == []


def test_what_may_pass_is_asked_again(waits: list[float]) -> None:
    answers = (
        (429, {"Retry-After": "0"}, "slow down"),
        (429, {"Retry-After": "7.5"}, "slow down"),
        (503, {}, "loading"),
        None,  # hangs up
        (200, {}, "<html>a proxy's page</html>"),
        (200, {}, '{"choices": []}'),
        GOOD,
    )
    with client_of(in_turn(*answers), waits, attempts=7) as (server, client):
        assert client.complete(HELLO, 0.0).text == GOOD
    assert len(server.requests) == 7
    assert waits[:2] == [0, 7.5]
    # 4, 8, 16 and 32 s by the number of the attempt, each with up to a second more.
    for wait, expected in zip(waits[2:], (4, 8, 16, 32), strict=True):
        assert expected <= wait <= expected + 1


def test_retry_after_may_be_a_date_and_is_bounded(waits: list[float]) -> None:
    answers = (
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, ""),
        (429, {"Retry-After": "90000"}, ""),
        GOOD,
    )
    with client_of(in_turn(*answers), waits) as (_, client):
        client.complete(HELLO, 0.0)
    assert waits == [0, 600]


def test_a_slow_server_is_asked_again(waits: list[float]) -> None:
    def slow_at_first(body: dict, number: int) -> str:
        if number == 0:
            server.ended.wait()
        return GOOD

    with client_of(slow_at_first, waits, timeout_s=1.0) as (server, client):
        assert client.complete(HELLO, 0.0).text == GOOD
    assert len(server.requests) >= 2  # a busy machine may be late as well


@pytest.mark.parametrize(
    ("answer", "error", "message", "asked"),
    [
        ((500, {}, "out of memory"), RunFailedError, "answers 500: out of memory", 3),
        ((200, {}, "[]"), RunFailedError, r"answers no chat completion: \[\]", 3),
        (None, RunFailedError, "the judge at http", 3),
        ((400, {}, "max_tokens is too large"), RefusedError, "answers 400: max_tokens is", 1),
        ((401, {}, "wrong key secret-1"), RefusedError, r"answers 401: wrong key \(key\)$", 1),
    ],
)
def test_what_does_not_pass(
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    error: type[Exception],
    message: str,
    asked: int,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    with judge_server(in_turn(answer)) as server:
        options = config(server.url, attempts=3, api_key_env="JUDGE_KEY")
        with JudgeClient(options, waits.append) as client, pytest.raises(error, match=message):
            client.complete(HELLO, 0.0)
    assert len(server.requests) == asked


@pytest.fixture
def closed_port() -> Iterator[str]:
    """A port that nobody listens on and nobody else can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_a_judge_that_is_not_there(closed_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"url=http.*: no judge answers there \(.*refused"):
        JudgeClient(config(closed_port)).check()
    for models, message in (
        (["prometheus", "judges"], "unknown model 'judge'; did you mean judges"),
        (401, "the server refuses the key"),
    ):
        with (
            judge_server(in_turn(GOOD), models) as server,
            pytest.raises(UsageError, match=message),
        ):
            JudgeClient(config(server.url)).check()
    with judge_server(in_turn(GOOD), models=404) as server:
        JudgeClient(config(server.url)).check()  # it does not list its models
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UsageError, match="api_key_env=NO_SUCH_KEY: no such variable is set"):
        JudgeClient(config(closed_port, api_key_env="NO_SUCH_KEY"))
    for options in ({"url": None}, {"model": None}):
        with pytest.raises(UsageError, match="the judge is not named"):
            JudgeClient(replace(config(closed_port), **options))


def test_an_answer_without_a_score_is_asked_again_then_unjudged(
    tmp_path: Path, waits: list[float]
) -> None:
    answers = {
        "question 0": ["No idea.", "[RESULT] 7", "It is good. [RESULT] 2"],
        "question 1": ["(Score 5)", "[RESULT] 9", "", GOOD],
        "question 2": [GOOD],
        "question 3": [completion("Fine. [RESULT] 1", "length"), GOOD],
        "question 4": [completion(None), GOOD],
    }

    def answer(body: dict, number: int) -> Answer:
        said = answers[body["messages"][0]["content"]].pop(0)
        return (200, {}, said) if said.startswith("{") else said

    with judge_server(answer) as server:
        with JudgeClient(config(server.url, concurrency=1), waits.append) as client:
            judge = Judge(client, tmp_path / "judgements.jsonl")
            found = judge.ask(questions(5))
            assert [(each.result, each.times_asked) for each in found] == [
                (2, 3),
                (None, 3),  # the fourth answer would have had a score
                (4, 1),
                (4, 2),  # cut off behind the 1, which might have been 1.5 or a quotation
                (4, 2),
            ]
            assert found[1].text == ""
            # The published temperature of a judgement, another one where it is asked again.
            assert [request["temperature"] for request in server.requests[:4]] == [
                0.0,
                1.0,
                1.0,
                0.0,
            ]
            assert judge.ask(questions(5)) == found
        assert len(server.requests) == 11
        # Another process asks nothing again: an unjudged answer stays one.
        with JudgeClient(config(server.url), waits.append) as client:
            assert Judge(client, tmp_path / "judgements.jsonl").ask(questions(5)) == found
        assert len(server.requests) == 11
        # Another judge does.
        answers["question 2"] = [GOOD]
        with JudgeClient(config(server.url, temperature=0.5), waits.append) as client:
            Judge(client, tmp_path / "judgements.jsonl").ask(questions(5)[2:3])
        assert len(server.requests) == 12


def test_several_at_once_and_equal_questions_once(tmp_path: Path, waits: list[float]) -> None:
    together = threading.Barrier(4)  # passes when four are under way

    def answer(body: dict, number: int) -> str:
        if number < 4:
            together.wait()
        return f"[RESULT] {int(body['messages'][0]['content'][-1]) % 5 + 1}"

    with client_of(answer, waits, concurrency=4) as (server, client):
        found = Judge(client, tmp_path / "judgements.jsonl").ask(questions(9) + questions(2))
    assert [each.result for each in found] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 1, 2]
    assert sorted(server.prompts) == [f"question {n}" for n in range(9)]
    assert server.most_at_once == 4
    assert len(read_rows(tmp_path / "judgements.jsonl")) == 9


def test_a_server_that_goes_loses_nothing(tmp_path: Path, waits: list[float]) -> None:
    file = tmp_path / "judgements.jsonl"
    gone = (500, {}, "gone")
    with (
        client_of(
            lambda body, number: GOOD if number < 3 else gone, waits, attempts=2, concurrency=1
        ) as (server, client),
        pytest.raises(RunFailedError, match="answers 500: gone"),
    ):
        Judge(client, file).ask(questions(6))
    assert len(read_rows(file)) == 3
    with client_of(in_turn(GOOD), waits) as (server, client):
        assert [each.result for each in Judge(client, file).ask(questions(6))] == [4] * 6
    assert sorted(server.prompts) == ["question 3", "question 4", "question 5"]


def test_a_request_that_is_refused(tmp_path: Path, waits: list[float]) -> None:
    """The first of all is everybody's fault and ends the run; a later one is its own."""
    too_long = (400, {}, "maximum context length is 4096")
    refused = {f"question {n}" for n in range(4)}

    def answer(body: dict, number: int) -> Answer:
        return too_long if body["messages"][0]["content"] in refused else GOOD

    with judge_server(answer) as server:
        one = config(server.url, concurrency=1)
        with (
            JudgeClient(one, waits.append) as client,
            pytest.raises(RefusedError, match="maximum context length"),
        ):
            Judge(client, tmp_path / "judgements.jsonl").ask(questions(4))
        assert read_rows(tmp_path / "judgements.jsonl") == []
        refused.intersection_update({"question 2"})
        with JudgeClient(one, waits.append) as client:
            found = Judge(client, tmp_path / "judgements.jsonl").ask(questions(4))
    assert [each.result for each in found] == [4, 4, None, 4]
    assert "answers 400: maximum context length is 4096" in found[2].text


KILLED = """
import sys
from pathlib import Path
from tests.evaluation.judge.test_client import config, questions
from ic.evaluation.judge.client import JudgeClient
from ic.evaluation.judge.grading import Judge
client = JudgeClient(config(sys.argv[1], concurrency=1))
Judge(client, Path(sys.argv[2])).ask(questions(8))
"""


def test_killed_and_continued_without_repeating(tmp_path: Path, waits: list[float]) -> None:
    file = tmp_path / "judgements.jsonl"
    process: list[subprocess.Popen] = []

    def answer(body: dict, number: int) -> Answer:
        if number == 5:
            os.kill(process[0].pid, signal.SIGKILL)
            return None
        return GOOD

    with judge_server(answer) as server:
        process.append(subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(file)]))
        assert process[0].wait() == -signal.SIGKILL
        assert len(read_rows(file)) == 5
        with file.open("a") as cut:  # as a kill amid a line leaves it
            cut.write('{"key": "')
        with JudgeClient(config(server.url, concurrency=1), waits.append) as client:
            assert len(Judge(client, file).ask(questions(8))) == 8
    # The sixth was asked and not answered; every other one was asked once.
    assert server.prompts == [f"question {n}" for n in (0, 1, 2, 3, 4, 5, 5, 6, 7)]
    assert len({json.dumps(row) for row in read_rows(file)}) == len(read_rows(file)) == 8
