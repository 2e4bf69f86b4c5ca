"""What the registry and the trackers refuse before anything is asked of a server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ic.checkpoint.source import find_source
from ic.errors import UsageError
from ic.run.registry_options import PromoteOptions, RegisterOptions
from ic.tracking.registry import CHECKSUMS, Registry, Version, digest_of, write_listing
from ic.tracking.server import check_server, server_uri

pytest.importorskip("mlflow")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        (RegisterOptions, {"name": "a"}, "give one of run=FOLDER and source=MODEL"),
        (RegisterOptions, {"name": "a", "run": "r", "source": "s"}, "give one of run="),
        (RegisterOptions, {"name": "a/b", "run": "r"}, "name='a/b': give letters"),
        (RegisterOptions, {"name": "a", "run": "r", "alias": "champion"}, "promote it past its gate"),
        (RegisterOptions, {"name": "a", "run": "r", "uri": "sqlite:///x"}, "uri=sqlite:///x: no address"),
        (PromoteOptions, {"name": "a"}, "a promotion has a gate"),
        (PromoteOptions, {"name": "a", "judged_by": "passkey"}, "judged_by= and at_least= go together"),
        (PromoteOptions, {"name": "a", "judged_by": "passkey", "at_least": 90.0}, "at_least=90.0: a share"),
        (PromoteOptions, {"name": "a", "compare": True, "length_tokens": 9}, "length_tokens=9: give"),
        (PromoteOptions, {"name": "a", "compare": True, "version": 0}, "version=0: must be"),
        (PromoteOptions, {"name": "a", "roll_back": True, "compare": True}, "roll_back=true goes"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    options: Callable[..., Any], given: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        options(**given)


@pytest.mark.parametrize("uri", ["here", "file:///tmp/x", "http://", "http://a:b", "http://a:0"])
def test_what_is_no_server(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no address of an MLflow server"):
        check_server("logger.mlflow.uri", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI="):
        server_uri("uri", None)


@pytest.mark.parametrize("uri", ["http://me:hidden@h:5000", "me:hidden@h", "http://hidden@h:x"])
def test_passwords_of_a_server_are_not_shown(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UsageError, match="set MLFLOW_TRACKING_USERNAME and") as found:
        server_uri("uri", None)
    assert "hidden" not in str(found.value)


def test_a_server_that_nobody_named() -> None:
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI is not set"):
        find_source("models:/tiny@champion")
    with pytest.raises(UsageError, match="write models:/NAME@ALIAS or models:/NAME/VERSION"):
        find_source("models:/tiny")


@pytest.mark.parametrize(
    "asked",
    [
        ("serve", "backend=engine", "port=0", "source={}"),
        ("evaluate", "suite=passkey", "checkpoint={}"),
        ("generate", "prompt=hello", "checkpoint={}"),
        ("convert", "output=out", "source={}"),
    ],
    ids=lambda asked: asked[0],
)
def test_a_registry_that_is_down_is_one_line(asked: tuple[str, ...], tmp_path: Path) -> None:
    """Each verb says so before it loads PyTorch, which it would announce in a line before."""
    down = "http://127.0.0.1:9"
    command = [part.format("models:/tiny@champion") for part in asked]
    env = {**os.environ, "MLFLOW_TRACKING_URI": down, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    env["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(
        [sys.executable, "-m", "ic", *command],
        capture_output=True, text=True, cwd=tmp_path, env=env, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"ic: the registry at {down} does not do it: ")
    assert "is the server up, and is MLFLOW_TRACKING_URI its address?" in line
    assert not ended.stdout
    assert not list(tmp_path.iterdir())


def copies(monkeypatch: pytest.MonkeyPatch, there: Path) -> None:
    """Files come from a folder in place of a server."""

    def download(uri: str, dst_path: str, tracking_uri: str) -> str:
        target = Path(dst_path) / Path(uri).name
        target.write_bytes((there / uri.removeprefix("x:/")).read_bytes())
        return str(target)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)


def test_files_are_compared_with_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    (there / "evaluation/passkey").mkdir(parents=True)
    for name in ("README.md", "MLmodel", "model.safetensors", "evaluation/passkey/samples.jsonl"):
        (there / name).write_text(name)
    write_listing(there)
    copies(monkeypatch, there)
    registry = Registry("uri", "http://127.0.0.1:9")
    version = Version("tiny", 3, digest_of(there), "x:/", {})

    part = registry.download(version, "evaluation")
    assert sorted(p.name for p in part.rglob("*") if p.is_file()) == [CHECKSUMS, "samples.jsonl"]
    whole = registry.download(version)
    assert whole == part
    assert (whole / "model.safetensors").read_text() == "model.safetensors"
    assert whole.name == "tiny-v3"

    (whole / "model.safetensors").unlink()
    (there / "model.safetensors").write_text("another")
    with pytest.raises(UsageError, match="model.safetensors differs from what was registered"):
        registry.download(version)
    assert not (whole / "model.safetensors").exists()
    with pytest.raises(UsageError, match=f"its {CHECKSUMS} is not the one that was registered"):
        registry.download(Version("tiny", 4, "0" * 64, "x:/", {}))
    with pytest.raises(UsageError, match="models:/tiny/5 is unsigned: it has no tag"):
        registry.download(Version("tiny", 5, None, "x:/", {}))
    (there / "README.md").unlink()
    write_listing(there)
    with pytest.raises(UsageError, match=r"models:/tiny/6 is unsigned: it has no README.md"):
        registry.download(Version("tiny", 6, digest_of(there), "x:/", {}))
    (there / CHECKSUMS).write_text(
        f"{'0' * 64}  ../../escaped\n{'0' * 64}  README.md\n{'0' * 64}  MLmodel\n"
    )
    with pytest.raises(UsageError, match="which lies elsewhere"):
        registry.download(Version("tiny", 7, digest_of(there), "x:/", {}))


def test_sources_are_found_without_mlflow() -> None:
    """Help and refusals come at once: neither client is imported before it is needed."""
    code = (
        "import sys; import ic.startup; import ic.verbs.register, ic.verbs.promote, ic.verbs.sync, ic.verbs.serve; "
        "import ic.config.run; print([m for m in ('mlflow', 'wandb', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
