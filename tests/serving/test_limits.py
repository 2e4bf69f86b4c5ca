"""No client holds the server up: what is large, slow, late or gone ends, and its pages are free."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from ic.inference.engine.runner import Runner
from ic.serving.options import LimitOptions
from tests.serving.served import NAME, Served, served
from tests.serving.test_refusals import told

# Thousands of tokens: some seconds of work, unless it ends before.
LONG = {"max_tokens": 4000, "ignore_eos": True}
ABORTED = 'ic:request_success_total{finished_reason="abort"}'


@pytest.fixture(scope="module")
def strict(folder: Path) -> Iterator[Served]:
    with served(
        folder, limits=LimitOptions(body_bytes=5000, requests=2, unread_steps=10**6)
    ) as found:
        yield found


def connect(found: Served, **body: Any) -> socket.socket:
    """A client that asks for a stream, and has read nothing so far."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(found.url.rpartition(":")[2])))
    content = json.dumps({"prompt": "a", "stream": True, "temperature": 0, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_a_body_that_is_too_large(strict: Served) -> None:
    body = json.dumps({"prompt": "a" * 6000}).encode()
    headers = {"content-type": "application/json"}
    pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))  # of unknown length
    for content in (body, pieces):
        response = httpx2.post(f"{strict.url}/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert told(response)["code"] == "request_too_large"
    assert strict.complete(max_tokens=1).status_code == 200


def test_a_request_that_does_not_arrive(folder: Path) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
    with served(folder, limits=LimitOptions(read_s=0.3)) as found:
        port = int(found.url.rpartition(":")[2])
        for sent in (b"", b"GET / HT", head, head + b"content-type: application/json\r\n\r\n{"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(sent)
                answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 408")
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["code"] == "request_timeout"


def test_more_requests_than_places(strict: Served) -> None:
    before = strict.metrics()
    # More than the system takes for clients that do not read, so that they hold their places.
    large = {**LONG, "logprobs": 20}
    with connect(strict, **large) as one, connect(strict, **large) as other:
        for connection in (one, other):
            assert connection.recv(12) == b"HTTP/1.1 200"
        response = strict.complete()
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert told(response)["code"] == "rate_limit_exceeded"
    strict.wait_for(ABORTED, before[ABORTED] + 2)
    strict.wait_until_idle()
    # OpenAI's client asks again, as the answer says, and n counts.
    assert strict.client(max_retries=2).completions.create(model=NAME, prompt="a", n=2).choices
    assert told(strict.complete(n=3))["param"] == "n"


def test_an_answer_that_takes_too_long(folder: Path) -> None:
    with served(folder, limits=LimitOptions(answer_s=0.5)) as found:
        response = found.complete(**LONG)
        assert response.status_code == 504
        assert told(response)["code"] == "timeout"
        with pytest.raises(openai.APIError, match="within 0.5 seconds"):
            list(
                found.client().completions.create(
                    model=NAME,
                    prompt="a",
                    max_tokens=4000,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
        found.wait_until_idle()


def test_a_reader_that_is_too_slow(folder: Path) -> None:
    for limits in (LimitOptions(unread_steps=64), LimitOptions(unread_steps=9999, write_s=0.2)):
        with (
            served(folder, limits=limits) as found,
            connect(found, **LONG, logprobs=20) as connection,
        ):
            assert connection.recv(12) == b"HTTP/1.1 200"
            found.wait_for(ABORTED, 1)
            found.wait_until_idle()
            assert b"[DONE]" not in read_all(connection)  # cut off
            assert found.complete(max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_pages(strict: Served, stream: bool) -> None:
    before = strict.metrics()[ABORTED]
    with connect(strict, **LONG, stream=stream):
        assert strict.wait_for("ic:num_requests_running", 1)["ic:cache_pages_used"] > 0
    strict.wait_for(ABORTED, before + 1)
    strict.wait_until_idle()


def test_a_server_that_ends_finishes_its_answers(folder: Path) -> None:
    asked: dict[str, Any] = {"prompt": "The key", "max_tokens": 400, "ignore_eos": True}
    with served(folder, limits=LimitOptions(unread_steps=10**6)) as found:
        expected = found.complete(**asked).json()["choices"][0]["text"]
        # More than the system takes for a client that does not read, so that it is not finished.
        with connect(found, **asked, logprobs=20) as connection:
            begun = connection.recv(12)
            assert begun == b"HTTP/1.1 200"
            assert found.server is not None
            found.server.handle_exit(signal.SIGTERM, None)
            for response in (found.complete(), httpx2.get(f"{found.url}/health")):
                assert response.status_code == 503
                assert told(response)["code"] == "server_shutting_down"
            *events, last = re.findall(rb"data: (.*)\n\n", read_all(connection))
        assert last == b"[DONE]"
        assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == expected
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{found.url}/health")


def test_a_server_that_may_not_wait_says_so(folder: Path) -> None:
    answers: list[httpx2.Response] = []
    with served(folder, limits=LimitOptions(drain_s=0.1)) as found:
        whole = threading.Thread(target=lambda: answers.append(found.complete(**LONG)))
        whole.start()
        stream = found.client().completions.create(
            model=NAME, prompt="a", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        found.wait_for("ic:num_requests_running", 2)
        assert found.server is not None
        found.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        whole.join()
    assert answers[0].status_code == 503
    assert told(answers[0])["code"] == "server_shutting_down"


def test_an_engine_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with served(folder) as found:
        with monkeypatch.context() as broken:
            broken.setattr(Runner, "read", fail)
            for failures in range(3):
                assert httpx2.get(f"{found.url}/health").status_code == 200, failures
                for response in (found.complete(n=2), found.complete(stream=True)):
                    assert response.status_code == 500
                    assert told(response)["code"] == "internal_error"
                    assert "CUDA error" in told(response)["message"]
                if failures == 0:  # the next answer makes up for it
                    broken.undo()
                    assert found.complete(max_tokens=2).status_code == 200
                    broken.setattr(Runner, "read", fail)
            assert told(httpx2.get(f"{found.url}/health"))["code"] == "internal_error"
        assert found.complete(max_tokens=2).status_code == 200
        assert httpx2.get(f"{found.url}/health").status_code == 200
        found.wait_until_idle()
