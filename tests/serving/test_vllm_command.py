"""The command of vLLM's server: what it is given, and what is refused before it runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ic.serving.vllm_command import vllm_environment

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
TOKEN = "a-token-of-sixteen-or-more"


def test_the_command_is_shown(
    ic: Run, capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IC_SERVE_TOKEN", TOKEN)
    code = ic(
        "serve", f"source={folder}", "backend=vllm", "dry_run=true", "host=0.0.0.0", "port=9000",
        "dtype=bfloat16", "vllm_arguments=[--max-model-len,2048]",
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr()
    assert shlex.split(shown.out) == [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *(f"--model={folder}", "--served-model-name=tiny", "--host=0.0.0.0", "--port=9000"),
        *("--dtype=bfloat16", "--max-model-len", "2048"),
    ]
    assert TOKEN not in shown.out + shown.err


def test_the_token_is_in_the_environment_alone() -> None:
    given = {"PATH": "/bin", "VLLM_API_KEY": "of another server"}
    assert vllm_environment(TOKEN, given) == {"PATH": "/bin", "VLLM_API_KEY": TOKEN}
    assert vllm_environment(None, given) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["host=0.0.0.0"], "needs a token"),
        (["vllm_arguments=[--api-key=x]"], "--api-key is given by token_env="),
        (["vllm_arguments=[--host,0.0.0.0]"], "--host is given by host="),
        (["tokenizer=bytes"], "vLLM needs a folder"),
        (["limits.requests=5"], "limits is for backend=engine"),
        (["engine.max_batch=5"], "engine is for backend=engine"),
        (["attention=triton"], "attention is for backend=engine"),
        (["port=0"], "vLLM's server needs a port"),
        (["vllm_python=/no/python"], "vllm_python=/no/python: No such file"),
        ([], "vLLM is not installed"),
    ],
)
def test_what_vllm_does_not_serve(
    ic: Run,
    capsys: Capture,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    says: str,
) -> None:
    monkeypatch.delenv("IC_SERVE_TOKEN", raising=False)
    assert ic("serve", f"source={folder}", "backend=vllm", *given) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]
