"""Verbs that load a model take one of the registry by its alias: on a real MLflow server, each gives
what it gives for the folder that was registered, and refuses in one line what cannot be had.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ic.checkpoint.folder import load_model
from ic.files.json_lines import read_rows
from ic.model.byte_tokenizer import ByteTokenizer
from ic.tracking.registry import registered_folder
from tests.gqa import FAMILIES
from tests.serving.served import save_model

pytest.importorskip("mlflow")
pytestmark = [pytest.mark.tracking, pytest.mark.usefixtures("mlflow_environment")]

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
CARD = "A Llama of random weights, for tests.\n"
# What each verb is asked beside its source.
VERBS = {
    "generate": (
        "generate",
        "prompt=The key",
        "max_new_tokens=6",
        "accelerator=cpu",
        "checkpoint=",
    ),
    "evaluate": (
        "evaluate",
        "suite=passkey",
        "evaluation.lengths=[256]",
        "evaluation.depths=[0.5]",
        "accelerator=cpu",
        "checkpoint=",
    ),
    "convert": ("convert", "output=converted", "accelerator=cpu", "parity=null", "source="),
    "serve": ("serve", "backend=engine", "port=0", "accelerator=cpu", "source="),
}


def ask(ic: Run, verb: str, source: str | Path) -> int:
    *args, key = VERBS[verb]
    registered_folder.cache_clear()  # as another process
    return ic(*args, f"{key}{source}")


def foreign(folder: Path) -> Path:
    """A Llama with its tokenizer, its card, and code that has no place in a registry."""
    FAMILIES["llama"].model(vocab_size=320, eos_token_id=257).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "modeling_llama.py").write_text("raise RuntimeError\n")
    return folder


def champion(ic: Run, name: str, source: Path, *evaluation: str) -> None:
    """A first version, promoted past a gate that asks for nothing."""
    assert ic("register", f"name={name}", f"source={source}", *evaluation) == 0
    assert ic("promote", f"name={name}", "judged_by=passkey", "at_least=0") == 0


def test_generate_and_evaluate(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    folder = save_model(tmp_path / "export")
    assert ask(ic, "evaluate", folder) == 0
    measured = Path("runs/evaluate/export")
    champion(ic, "ours", folder, f"evaluation={measured}")
    alias = "models:/ours@champion"

    capsys.readouterr()
    assert ask(ic, "generate", folder) == 0
    said = capsys.readouterr().out
    assert ask(ic, "generate", alias) == 0
    assert capsys.readouterr().out == said

    assert ask(ic, "evaluate", alias) == 0
    page = Path("runs/evaluate/ours-v1/report.md").read_text()
    assert "passkey" in page

    def answers(of: Path) -> list[Any]:
        samples = read_rows(of / "passkey/samples.jsonl")
        return [(one["expected"], one["text"], one["correct"]) for one in samples]

    assert len(answers(measured)) >= 2
    assert answers(Path("runs/evaluate/ours-v1")) == answers(measured)


def test_a_registered_llama_is_converted(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    folder = foreign(tmp_path / "llama")
    assert ask(ic, "evaluate", folder) == 0
    champion(ic, "llama", folder, "evaluation=runs/evaluate/llama")
    assert ask(ic, "convert", "models:/llama@champion") == 0

    ids_BT = torch.arange(1, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids_BT).logits
    ours = load_model(Path("converted"))(ids_BT).logits
    assert torch.dist(ours, theirs) / theirs.norm() < 1e-5
    kept = registered_folder("models:/llama@champion")
    assert (kept / "README.md").read_text() == CARD
    assert not list(kept.glob("*.py"))
    flavour = yaml.safe_load((kept / "MLmodel").read_text())["flavors"]["infinite_context"]
    assert flavour["model_type"] == "llama"
    assert flavour["vocabulary_tokens"] == 320

    def refused(*args: str) -> str:
        assert ic(*args) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ic: ")]
        return line

    (folder / "README.md").unlink()
    assert "unsigned: it has no model card" in refused("register", "name=b", f"source={folder}")
    (folder / "README.md").write_text(CARD)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no model.safetensors" in refused("register", "name=b", f"source={folder}")
    shutil.copyfile(folder / "README.md", folder / "config.json")
    assert "README.md" not in refused("register", "name=b", f"source={folder}")


@pytest.mark.parametrize("verb", VERBS)
def test_an_alias_that_is_not_there(ic: Run, verb: str, tmp_path: Path, capsys: Capture) -> None:
    folder = foreign(tmp_path / "llama") if verb == "convert" else save_model(tmp_path / "export")
    assert ic("register", f"name=of_{verb}", f"source={folder}") == 0
    assert ask(ic, verb, f"models:/of_{verb}@champion") == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == (
        f"ic: models:/of_{verb}@champion: the model has no alias 'champion'; it has candidate (1)"
    )
    assert not Path("converted").exists()
