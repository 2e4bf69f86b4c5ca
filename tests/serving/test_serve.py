"""The verb: what it refuses before it loads a model, and how its process ends."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ic.errors import UsageError
from ic.serving import listening
from ic.serving.options import LimitOptions, ServeOptions
from ic.verbs import serve
from tests.serving.served import NAME, process

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
TOKEN = "a-token-of-sixteen-or-more"


@pytest.fixture(autouse=True)
def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IC_SERVE_TOKEN", raising=False)


def refusal(ic: Run, capsys: Capture, *args: str) -> str:
    """The one line that is said instead of serving; no model is loaded."""
    assert ic("serve", *args) == 2
    said = capsys.readouterr().err
    assert "loading" not in said
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1
    return lines[0]


def test_a_port_that_is_taken(ic: Run, capsys: Capture, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(ic, capsys, f"source={folder}", "backend=engine", f"port={port}")
    assert f"port={port}" in said
    assert "in use" in said
    assert "choose another" in said


def test_checking_an_address_lets_nobody_connect(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """A connection that waits at a socket is reset when it is closed, though a server comes."""

    def listened(*_: object) -> None:
        raise AssertionError("it listens")

    monkeypatch.setattr(socket.socket, "listen", listened)
    serve.check(ServeOptions(source=str(folder), backend="engine", port=0))
    monkeypatch.undo()
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UsageError, match="cannot listen on host=127.0.0.1 .*in use"),
    ):
        listening.check_address("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["source=nowhere"], "no checkpoint folder nowhere"),
        (["host=0.0.0.0"], "needs a token: set the environment variable IC_SERVE_TOKEN"),
        (["host=no.such.name.example"], "no address of this name"),
        (["host=192.0.2.1", "token_file=token"], "cannot listen on host=192.0.2.1"),
        (["token_file=short"], "short holds no token"),
        (["token_file=none"], "none: No such file"),
        (["port=65536"], "port=65536: must be from 0"),
        (["vllm_arguments=[--seed,1]"], "vllm_arguments is for backend=vllm"),
        (["dry_run=true"], "dry_run is for backend=vllm"),
        (["limits.requests=0"], "limits.requests=0: must be at least 1"),
        (["limits.drain_s=0"], "limits.drain_s=0.0: must be above 0"),
        (["engine.page_tokens=7"], "page_tokens=7: must be a multiple of 16"),
    ],
)
def test_what_cannot_be_served(
    ic: Run, capsys: Capture, folder: Path, tmp_path: Path, given: list[str], says: str
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "short").write_text("secret")
    said = refusal(ic, capsys, f"source={folder}", "backend=engine", *given)
    assert says in said
    assert "secret" not in said


def test_a_context_longer_than_model_or_cache(ic: Run, capsys: Capture, folder: Path) -> None:
    for tokens, says in ((5000, "the model has 4096 positions"), (2000, "the cache holds 1024")):
        code = ic(
            "serve", f"source={folder}", "backend=engine", "port=0", "accelerator=cpu",
            "engine.cache_tokens=1024", f"limits.context_tokens={tokens}",
        )  # fmt: skip
        assert code == 2
        assert says in capsys.readouterr().err


def test_options_of_the_other_backend() -> None:
    with pytest.raises(ValueError, match="limits is for backend=engine"):
        ServeOptions(source="x", limits=LimitOptions(requests=3)).refuse_engine_options()
    ServeOptions(source="x", limits=LimitOptions()).refuse_engine_options()


@pytest.mark.slow
def test_a_process_that_is_told_to_end_finishes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    asked = {"model": NAME, "prompt": "a", "max_tokens": 600, "temperature": 0}
    with process(folder, f"token_file={tmp_path / 'token'}", "limits.answer_s=300") as (
        server,
        found,
    ):
        found.token = TOKEN
        client = found.client()
        streams = [
            client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
            for _ in range(3)
        ]
        texts = [next(iter(stream)).choices[0].text for stream in streams]
        server.send_signal(signal.SIGTERM)
        whole = ["" for _ in streams]

        def read(index: int) -> None:
            rest = list(streams[index])
            assert rest[-1].choices[0].finish_reason == "length"
            whole[index] = texts[index] + "".join(chunk.choices[0].text for chunk in rest)

        readers = [threading.Thread(target=read, args=(index,)) for index in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert server.wait() == 0
    assert len(set(whole)) == 1
    assert len(whole[0]) > 100
