"""What cannot be answered gets an error in OpenAI's form that names what is wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from ic.serving.errors import ApiError
from ic.serving.requests import ChatBody, CompletionBody, parse
from tests.serving.served import NAME, Served, served

TOKEN = "a-token-of-sixteen-or-more"
CODES = {"model_not_found", "invalid_value", "context_length_exceeded"}
HELLO = [{"role": "user", "content": "hi"}]


def told(response: httpx2.Response) -> dict[str, Any]:
    """The error of a response, whose form is checked."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ["a", 3]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": [[1], ["a"]]}, "prompt", "invalid_value"),
        ({"prompt": "a", "model": 3}, "model", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "temperature": True}, "temperature", "invalid_value"),
        ({"prompt": "a", "n": 0}, "n", "invalid_value"),
        ({"prompt": "a", "n": 129}, "n", "invalid_value"),
        ({"prompt": "a", "stop": 5}, "stop", "invalid_value"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"prompt": "a", "heat": 1}, "heat", "unknown_parameter"),
        ({"prompt": "a", "best_of": 2}, "best_of", "unsupported_parameter"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, "logit_bias", "unsupported_parameter"),
        ({"prompt": "a", "min_tokens": 3}, "min_tokens", "unsupported_parameter"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "unsupported_value"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", None),
        (
            {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "unsupported_parameter",
        ),
        (
            {"prompt": "a", "stream": True, "stream_options": {"x": 1}},
            "stream_options.x",
            "unknown_parameter",
        ),
    ],
)
def test_a_completion_s_body(body: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        parse(CompletionBody, json.dumps(body).encode())
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, code)
    assert param in refused.value.message


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "a", "x": "b"}]}, "messages[0].x", "unknown_parameter"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"messages": HELLO, "tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": HELLO, "store": True}, "store", "unsupported_parameter"),
        ({"messages": HELLO, "reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", None),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"messages": HELLO, "max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens", "invalid_value"),
        ({"messages": HELLO, "prompt": "a"}, "prompt", "unknown_parameter"),
    ],
)  # fmt: skip
def test_a_chat_s_body(body: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        parse(ChatBody, json.dumps(body).encode())
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, code)
    assert param in refused.value.message


def test_an_image_is_refused(server: Served) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    response = server.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": image}]}
    )
    assert response.status_code == 400
    assert told(response)["param"].startswith("messages[0].content")


def test_what_asks_for_nothing_is_taken() -> None:
    body = parse(
        ChatBody,
        b'{"messages": [{"role": "assistant", "content": "a", "refusal": null, "tool_calls": [], '
        b'"annotations": []}], "tools": [], "logit_bias": {}, "response_format": {"type": "text"},'
        b'"stop": null, "temperature": null, "user": "me", "store": false, "n": null}',
    )
    assert body.sampling(0, 5).temperature == 1.0
    assert body.sampling(0, 5).stop == ()
    both = {"messages": HELLO, "max_completion_tokens": 5, "max_tokens": 5}
    assert parse(ChatBody, json.dumps(both).encode()).asked_tokens(100) == 5
    # A value is that which asks for nothing, not one that Python takes for it.
    assert parse(CompletionBody, b'{"prompt": "a", "min_tokens": 0, "length_penalty": 1.0}')
    with pytest.raises(ApiError, match="min_tokens"):
        parse(CompletionBody, b'{"prompt": "a", "min_tokens": false}')


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "parse the JSON"),
        (b"{", "parse the JSON"),
        (b"[]", "must be an object"),
        (b'"a"', "must be an object"),
        (b'{"prompt": "\xff"}', "parse the JSON"),
        (b'{"prompt": "\\ud800"}', "parse the JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "parse the JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}", "seed"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "parse the JSON"),
    ],
)
def test_a_body_that_is_no_json(server: Served, body: bytes, says: str) -> None:
    response = httpx2.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert says in told(response)["message"]
    named = told(response)["param"] is not None
    assert told(response)["code"] == ("invalid_value" if named else None)


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"model": "gpt-4"}, 404, "model", "does not exist"),
        ({"temperature": 3}, 400, "temperature", "<= 2"),
        ({"top_p": 0}, 400, "top_p", "> 0"),
        ({"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ({"stop": [""]}, 400, "stop", "empty string"),
        ({"top_k": -2}, 400, "top_k", ">= 0"),
        ({"prompt": ""}, 400, "prompt", "Expected text or token ids that make at least one"),
        ({"prompt": [[]]}, 400, "prompt", "Expected text or token ids that make at least one"),
        ({"prompt": [5, 320]}, 400, "prompt", "token 320"),
        ({"stop_token_ids": [5, 320]}, 400, "stop_token_ids", "token 320"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids", "which are 0 to 319"),
        ({"prompt": "a" * 4000, "max_tokens": 97}, 400, "prompt", "4097 tokens (4000 in the"),
        ({"n": 100, "prompt": ["a"] * 3}, 400, "n", "300 answers"),
    ],
)
def test_a_request_out_of_range(
    server: Served, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    for stream in (False, True):  # a stream that cannot begin has a status, too
        response = server.complete(**body, stream=stream)
        assert response.status_code == status
        assert told(response)["param"] == param
        assert told(response)["code"] in CODES
        assert says in told(response)["message"]


def test_a_role_that_the_template_refuses(server: Served) -> None:
    messages = [{"role": "wizard", "content": "a"}]
    response = server.post("/v1/chat/completions", {"messages": messages})
    assert response.status_code == 400
    error = told(response)
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    assert (
        "roles are wizard; the template takes the roles system, user, assista" in error["message"]
    )


def test_routes_methods_and_types(server: Served) -> None:
    for method, route, status in (
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        headers = {"content-type": "application/json"}
        response = httpx2.request(method, f"{server.url}{route}", headers=headers)
        assert response.status_code == status
        assert route in told(response)["message"]
        assert told(response)["code"] is None
        assert ("allow" in response.headers) == (status == 405)
    form = httpx2.post(f"{server.url}/v1/completions", data={"prompt": "a"})
    assert form.status_code == 415
    assert "application/json" in told(form)["message"]


def test_names_that_a_browser_is_tricked_with(server: Served) -> None:
    for name, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]", 200), ("", 403)):
        response = httpx2.get(f"{server.url}/v1/models", headers={"host": name})
        assert response.status_code == status
    assert "evil" in told(httpx2.get(f"{server.url}/health", headers={"host": "evil"}))["message"]


def test_bytes_that_are_no_http(server: Served) -> None:
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b'"error": {"message": "Invalid HTTP' in body


def test_who_has_no_token(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with served(folder, token=TOKEN) as found:
        assert [m.id for m in found.client().models.list()] == [NAME]
        for key in ("wrong-token-of-this-length", TOKEN[:-1], TOKEN + "x", f"Basic {TOKEN}"):
            for route in ("/v1/models", "/metrics", "/openapi.json", "/none"):
                response = httpx2.get(
                    f"{found.url}{route}", headers={"authorization": f"Bearer {key}"}
                )
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert told(response)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=f"{found.url}/v1", api_key="no").completions.create(
                model=NAME, prompt="a"
            )
        # A body that is not allowed in is not read.
        large = httpx2.post(
            f"{found.url}/v1/completions",
            content=b"x" * 2**22,
            headers={"content-type": "application/json"},
        )
        assert large.status_code == 401
        assert httpx2.get(f"{found.url}/health").json() == {"status": "ok"}
        # With a token any name of the host will do: a proxy has its own.
        headers = {"authorization": f"Bearer {TOKEN}", "host": "models.example"}
        assert httpx2.get(f"{found.url}/v1/models", headers=headers).status_code == 200
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err
