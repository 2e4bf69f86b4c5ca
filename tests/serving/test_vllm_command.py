"""The command of vLLM's server: what it is given, and what is refused before it runs."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.source import find_source
from ic.model import MLAConfig, MLAForCausalLM
from ic.serving import vllm_command
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
        "--dtype=bfloat16",
        "--middleware=ic.serving.vllm_plugin.unauthorized.OpenAIUnauthorized",
        '--hf-overrides={"architectures":["MLAForCausalLM"]}',  # of a checkpoint, which lacks them
        *("--max-model-len", "2048"),
    ]
    assert TOKEN not in shown.out + shown.err


def test_an_export_says_what_it_is(ic: Run, capsys: Capture, folder: Path, tmp_path: Path) -> None:
    export_checkpoint(find_source(folder), tmp_path / "export")
    assert ic("serve", f"source={tmp_path}/export", "backend=vllm", "dry_run=true") == 0
    assert "hf-overrides" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("saved", "given", "told"),
    [
        (None, [], []),
        (None, ["cache_dtype=fp8"], ["--kv-cache-dtype=fp8"]),
        ("fp8", [], ["--kv-cache-dtype=fp8"]),
        ("int8", ["cache_dtype=fp8"], ["--kv-cache-dtype=fp8"]),
        ("fp8", ["vllm_arguments=[--kv-cache-dtype=auto]"], ["--kv-cache-dtype=auto"]),
        ("int8", ["vllm_arguments=[--kv-cache-dtype=auto]"], ["--kv-cache-dtype=auto"]),
        ("int8", [], None),
    ],
)
def test_the_cache_that_is_asked_for(
    ic: Run,
    capsys: Capture,
    folder: Path,
    tmp_path: Path,
    saved: str | None,
    given: list[str],
    told: list[str] | None,
) -> None:
    """By the option, else by the folder, as `quantize cache=` saves it; None is refused."""
    source = shutil.copytree(folder, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {} if saved is None else {"cache_dtype": saved}
    (source / "config.json").write_text(json.dumps(config))
    code = ic("serve", f"source={source}", "backend=vllm", "dry_run=true", *given)
    shown = capsys.readouterr()
    if told is None:
        assert code == 2
        assert "asks for an int8 cache, which vLLM does not have" in shown.err
        return
    assert code == 0
    assert [each for each in shlex.split(shown.out) if "cache" in each.partition("=")[0]] == told


def test_the_model_s_type_is_that_of_its_class() -> None:
    assert MLAConfig.model_type == vllm_command._MODEL_TYPE
    assert MLAForCausalLM.__name__ in vllm_command._ARCHITECTURE


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
        (["cache_dtype=int8"], "cache_dtype=int8: vLLM has no such cache"),
        (["cache_dtype=fp8", "vllm_arguments=[--kv_cache_dtype=auto]"], "leave one of them out"),
        (["vllm_python=/no/python"], "vllm_python=/no/python: No such file"),
        (["vllm_python=/no/python", "dry_run=true"], "vllm_python=/no/python: No such file"),
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
