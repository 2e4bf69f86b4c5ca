"""`experiment=heal`: what a run logs, saves and resumes, and the teachers that it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SMALL, randomize

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
SHARED: dict[str, Any] = {"vocab_size": 320, "max_position_embeddings": 128, "num_hidden_layers": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
FIT = (
    "fit",
    "experiment=heal",
    "model.init_from=student",
    "distillation.teacher=teacher",
    "data.train_files=[book.txt]",
    "data.document_unit=paragraph",
    "data.val_fraction=0.1",
    "data.context_length=64",
    "data.tokens_per_batch=256",
    "data.num_workers=0",
    "data.num_streams=1",
    "trainer.max_steps=4",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.val_check_interval=2",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    "optimizer.warmup_steps=0",
    "optimizer.decay_fraction=0",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.memory=null",
    "callbacks.samples=null",
    "logger.tensorboard=false",
)


def save_teacher(folder: Path, **changes: Any) -> None:
    torch.manual_seed(1)
    sizes = {**SHARED, **LLAMA, "num_key_value_heads": 2, **changes}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    randomize(model)
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student, a teacher and a text."""
    torch.manual_seed(0)
    student = MLAForCausalLM(MLAConfig(**{**SMALL, **SHARED, "q_lora_rank": None}))
    randomize(student)
    student.save_pretrained(tmp_path / "student")
    ByteTokenizer().save_pretrained(tmp_path / "student")
    save_teacher(tmp_path / "teacher")
    words = ["the", "sky", "is", "blue", "and", "the", "sea", "is", "deep", "and", "wide"]
    paragraphs = [f"{i} {' '.join(words[i % 7 :])}" for i in range(90)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    return tmp_path


def logged(run: Path) -> dict[str, list[float]]:
    """The values of each metric, in order; of what depends on the clock nothing."""
    with (run / "csv/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(("train/", "val/"))]
    timed = ("train/tokens_per_s", "train/step_time_s", "train/data_wait_share")
    return {
        name: [float(row[name]) for row in rows if row[name]] for name in names if name not in timed
    }


@pytest.mark.slow
def test_a_run_learns_and_resumes_exactly(ic: Run, folder: Path) -> None:
    assert ic(*FIT, "run_id=unbroken") == 0
    assert ic(*FIT, "trainer.max_steps=2") == 0
    unbroken, run = (folder / "runs/heal" / run_id for run_id in ("unbroken", "default"))
    more = ("trainer.max_steps=4", "allow_config_change=true")
    assert ic("fit", "run=runs/heal/default", *more) == 0
    assert logged(run) == logged(unbroken)

    metrics = logged(unbroken)
    assert metrics["train/loss"] == metrics["train/kl"]  # at temperature 1, without the text's own
    assert len(metrics["train/kl"]) == 4
    assert metrics["val/kl"][-1] < metrics["val/kl"][0]
    assert metrics["val/loss"] == pytest.approx(metrics["val/kl"])
    assert all(0 <= share <= 1 for share in metrics["val/agreement"])
    assert metrics["val/perplexity"][0] > 1

    last = unbroken / "checkpoints/last"
    before, after = (load_file(path / "model.safetensors") for path in (folder / "student", last))
    assert after.keys() == before.keys()  # none of the teacher's
    state = torch.load(last / "trainer.pt", weights_only=True)
    moved = state["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in moved) == len(before)

    assert ic("validate", "run=runs/heal/unbroken") == 0
    (file,) = (unbroken / "validate").glob("*.json")
    values = {row["metric"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    assert values["val/kl"] == pytest.approx(metrics["val/kl"][-1], rel=1e-6)


def test_offloading_and_chunks_change_nothing(ic: Run, folder: Path) -> None:
    short = ("trainer.max_steps=2", "distillation.cross_entropy_weight=0.25")
    assert ic(*FIT, *short, "run_id=plain") == 0
    other = ("distillation.offload=true", "distillation.chunk_tokens=100")
    assert ic(*FIT, *short, *other, "run_id=other") == 0
    plain, changed = (logged(folder / "runs/heal" / run_id) for run_id in ("plain", "other"))
    assert plain.keys() == changed.keys()
    for name, values in plain.items():
        assert changed[name] == pytest.approx(values, rel=1e-5), name
    assert plain["train/loss"] != pytest.approx(plain["train/kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"vocab_size": 384}, (), "has a vocabulary of 384 tokens and the student one of 320"),
        ({"max_position_embeddings": 32}, (), "the teacher has 32 positions"),
        ({}, ("distillation.teacher=teecher",), "did you mean teacher?"),
        ({}, ("strategy=fsdp",), "strategy=ddp or strategy=fsdp2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    ic: Run,
    folder: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    overrides: tuple[str, ...],
    said: str,
) -> None:
    save_teacher(folder / "teacher", **changes)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("the run has begun"))
    assert ic(*FIT, *overrides) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


@pytest.mark.parametrize("data", [("data=passkey",), ("data=preference", "preference=dpo")])
def test_data_without_plain_targets_are_refused(
    ic: Run, folder: Path, capsys: Capture, data: tuple[str, ...]
) -> None:
    given = ("model=pretrained", "model.init_from=student", "distillation=kl", *FIT[3:4], *data)
    assert ic("fit", *given, "callbacks.context_length=null", "callbacks.passkey=null") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{data[0]} goes without distillation" in line


def test_a_teacher_of_another_tokenizer_is_refused(
    ic: Run, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "words.txt").write_text("some words to learn tokens from, and some more words\n" * 20)
    assert ic("make_tokenizer", "files=[words.txt]", "output=words", "vocab_size=300") == 0
    for file in (folder / "teacher").glob("*token*"):
        file.unlink()
    for file in [*(folder / "teacher").glob("*vocab*"), *(folder / "words").iterdir()]:
        if file.parent.name == "words":
            (folder / "teacher" / file.name).write_bytes(file.read_bytes())
        else:
            file.unlink()
    monkeypatch.setattr(MLAForCausalLM, "__init__", lambda *args: pytest.fail("weights were made"))
    assert ic(*FIT) == 2
    assert "has another tokenizer than the run" in capsys.readouterr().err.splitlines()[-1]
