"""Preference training end to end: the reference on disk or in memory, LoRA, resume, bad input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ic.checkpoint.folder import load_model
from ic.training.metrics import BucketMeans, bucket_masks
from ic.training.options import PreferenceOptions
from ic.training.preference import PreferenceModule
from tests.training.conftest import PAIRS, write_jsonl

Run = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]
BASE = (
    "fit",
    "experiment=dpo_tiny",
    "data.train_files=[train.jsonl]",
    "data.val_files=[val.jsonl]",
    "data.test_files=[val.jsonl]",
    "data.context_length=128",
    "data.tokens_per_batch=512",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "callbacks.memory=null",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.checkpoint.keep_every_n_steps=2",
    "logger.tensorboard=false",
    "optimizer.warmup_steps=0",
)


@pytest.fixture
def fit(ic: Run, tmp_path: Path) -> Run:
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "val.jsonl", PAIRS[:2])
    write_jsonl(tmp_path / "test.jsonl", PAIRS[::-1])
    return lambda *args: ic(*BASE, *args)


def metrics(folder: Path, *columns: str) -> list[tuple[str, ...]]:
    rows = list(csv.DictReader((folder / "csv/metrics.csv").open()))
    return [tuple(r[c] for c in columns) for r in rows if all(r[c] for c in columns)]


@pytest.mark.slow
def test_precomputed_equals_a_frozen_reference(fit: Run, tmp_path: Path) -> None:
    assert fit("run_id=disk") == 0
    assert fit("run_id=memory", "preference.precompute_ref_log_probs=false") == 0
    columns = (
        "train/loss",
        "train/rewards/margins",
        "train/kl/chosen",
        "train/rewards/margins/to_64",
    )
    disk, memory = (
        metrics(tmp_path / "runs/dpo_tiny" / run, *columns) for run in ("disk", "memory")
    )
    assert len(disk) == 4
    for ours, theirs in zip(disk, memory, strict=True):
        assert [float(v) for v in ours] == pytest.approx([float(v) for v in theirs], abs=2e-5)
    # At the first step policy and reference are the same model.
    assert float(disk[0][0]) == pytest.approx(0.693147, abs=1e-5)
    assert float(disk[-1][0]) < 0.69


def test_a_killed_precompute_resumes_to_the_same_file(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("run_id=whole", "trainer.max_steps=1") == 0
    whole = (tmp_path / "runs/dpo_tiny/whole/reference.jsonl").read_bytes()
    assert len(whole.splitlines()) == 1 + len(PAIRS)  # the validation's pairs are among them
    forward, calls = PreferenceModule._reference_forward, []

    def stop(self: PreferenceModule, batch: dict[str, Any]) -> torch.Tensor:
        calls.append(batch["pair_keys"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(PreferenceModule, "_reference_forward", stop)
    fit("run_id=killed", "trainer.max_steps=1")
    folder = tmp_path / "runs/dpo_tiny/killed"
    partial = folder / "reference.jsonl.rank0.partial"
    assert not (folder / "reference.jsonl").exists()
    assert len(partial.read_text().splitlines()) == 3
    with partial.open("a") as file:
        file.write('{"key": "half a li')
    assert fit("run_id=killed", "trainer.max_steps=1", "overwrite=true") == 0
    assert len(calls) == 3 + 2
    assert (folder / "reference.jsonl").read_bytes() == whole
    assert not partial.exists()


def test_a_cache_of_another_reference_is_refused(
    fit: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"preference.reference_cache={tmp_path / 'ref.jsonl'}"
    assert fit("run_id=a", cache, "trainer.max_steps=1") == 0
    assert fit("run_id=b", cache, "trainer.max_steps=1") == 0
    capsys.readouterr()
    assert fit("run_id=c", cache, "seed=1") == 2
    message = capsys.readouterr().err
    assert "another reference: weights" in message
    assert "train.jsonl:1" in message


@pytest.mark.slow
def test_lora_resumes_exactly_and_merges(fit: Run, ic: Run, tmp_path: Path) -> None:
    lora = ("model/adapter=lora", "model.adapter.r=2")
    assert fit("run_id=whole", *lora) == 0
    runs = tmp_path / "runs/dpo_tiny"
    middle = runs / "whole/checkpoints/step=2"
    assert fit("run_id=resumed", *lora, f"ckpt_path={middle}") == 0
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = (
            load_file(runs / r / "checkpoints/last" / file) for r in ("whole", "resumed")
        )
        assert whole.keys() == resumed.keys()
        assert all(whole[name].equal(resumed[name]) for name in whole)
    base = load_file(runs / "whole/checkpoints/last/model.safetensors")
    first = load_file(runs / "whole/checkpoints/step=2/model.safetensors")
    assert all(base[name].equal(first[name]) for name in base)  # frozen
    merged = load_model(runs / "whole/checkpoints/last").state_dict()
    changed = {n.split(".")[-2] for n in base if not merged[n].equal(base[n])}
    assert changed == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    last = runs / "whole/checkpoints/last"
    assert ic("export", f"checkpoint={last}", "output=exported") == 0
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == base.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)


def test_resuming_without_the_adapter_is_refused(
    fit: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("model/adapter=lora", "model.adapter.r=2", "trainer.max_steps=2") == 0
    assert fit("ckpt_path=last", "allow_config_change=true") == 2
    assert "with a LoRA adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_validate_and_predict_read_the_runs_reference(
    fit: Run, ic: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    assert ic("validate", *BASE[1:], "ckpt_path=last") == 0
    assert "val/rewards/accuracies/to_64" in capsys.readouterr().out
    assert ic("predict", *BASE[1:], "ckpt_path=last") == 0
    rows = (tmp_path / "runs/dpo_tiny/default/predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["row"].endswith(f"val.jsonl:{i}") for i, row in enumerate(rows, 1)] == [
        True
    ] * 2
    write_jsonl(tmp_path / "other.jsonl", [dict(PAIRS[0], chosen=PAIRS[1]["chosen"])])
    capsys.readouterr()
    assert ic("validate", *BASE[1:], "ckpt_path=last", "data.val_files=[other.jsonl]") == 2
    assert "other.jsonl:1: " in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_write_one_reference_and_their_predictions(fit: Run, ic: Run, tmp_path: Path) -> None:
    settings = (
        *BASE[1:],
        "trainer.max_steps=1",
        "data.tokens_per_batch=256",
        "data.test_files=[test.jsonl]",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def on_two_ranks(verb: str, *more: str) -> None:
        command = [
            sys.executable,
            "-m",
            "ic",
            verb,
            *settings,
            "run_id=two",
            "strategy=ddp",
            "trainer.devices=2",
            *more,
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def written(run_id: str, file: str) -> list[str]:
        return (tmp_path / "runs/dpo_tiny" / run_id / file).read_text().splitlines()

    assert ic("fit", *settings, "run_id=one") == 0
    on_two_ranks("fit")
    assert written("two", "reference.jsonl") == written("one", "reference.jsonl")
    assert ic("predict", *settings, "run_id=two", "ckpt_path=last") == 0
    alone = [json.loads(row) for row in written("two", "predictions.jsonl")]
    on_two_ranks("predict", "ckpt_path=last")
    shared = [json.loads(row) for row in written("two", "predictions.jsonl")]
    assert len(alone) == len(PAIRS)
    by_row = {row.pop("row"): row for row in shared}
    expected = {row.pop("row"): row for row in alone}
    assert by_row.keys() == expected.keys()
    for row, values in expected.items():
        assert by_row[row] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_sft_then_dpo(fit: Run, ic: Run, tmp_path: Path) -> None:
    chats = [{"messages": p["prompt"] + p["chosen"]} for p in PAIRS]
    write_jsonl(tmp_path / "chats.jsonl", chats[1:])
    write_jsonl(tmp_path / "val-chats.jsonl", chats[:1])
    sft = [a for a in BASE[2:] if "_files" not in a]
    assert (
        ic(
            "fit",
            "experiment=sft_tiny",
            *sft,
            "data.train_files=[chats.jsonl]",
            "data.val_files=[val-chats.jsonl]",
            "model/adapter=lora",
            "model.adapter.r=2",
        )
        == 0
    )
    last = "checkpoints/last"
    start = f"model.init_from=runs/sft_tiny/default/{last}"
    # With a step that small, what is saved is what the run began with.
    assert fit(start, "trainer.max_steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0") == 0
    merged = load_model(tmp_path / "runs/sft_tiny/default" / last).state_dict()
    begun = load_model(tmp_path / "runs/dpo_tiny/default" / last).state_dict()
    assert begun.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-20)


def test_objective_and_data_go_together(ic: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert ic("fit", "data=preference") == 2
    assert "data=preference without an objective" in capsys.readouterr().err
    assert ic("fit", "experiment=mla_tiny", "preference=dpo") == 2
    assert "data=passkey with an objective" in capsys.readouterr().err


def test_bucket_means() -> None:
    tokens = torch.tensor([10, 64, 65, 500])
    masks = bucket_masks(tokens, [64, 128])
    assert {k: v.tolist() for k, v in masks.items()} == {
        "to_64": [True, True, False, False],
        "to_128": [False, False, True, False],
        "above_128": [False, False, False, True],
    }
    means = BucketMeans([64, 128])
    values = {name: torch.tensor([1.0, 2.0, 3.0, 4.0]) for name in BucketMeans.NAMES}
    means.update(values, tokens)
    means.update({name: torch.tensor([6.0]) for name in BucketMeans.NAMES}, torch.tensor([5]))
    got = means.compute()
    assert got["loss"] == 16 / 5
    assert got["loss/to_64"] == 3
    assert got["rewards/margins/above_128"] == 4
    assert got["loss/to_128"] == 3
    short = BucketMeans([64, 128])
    short.update({name: torch.tensor([6.0]) for name in BucketMeans.NAMES}, torch.tensor([5]))
    assert {n for n in short.compute() if n.startswith("loss")} == {"loss", "loss/to_64"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_type": ["dpo"]}, "one or more of sigmoid"),
        ({"loss_weights": [1.0, 2.0]}, "one weight for each"),
        ({"beta": 0.0}, "above 0"),
        ({"label_smoothing": 0.1}, "only robust and exo_pair"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"loss_type": ["exo_pair"]}, "more than 0"),
        ({"ld_alpha": 1.5}, r"\[0, 1\]"),
        ({"length_buckets": [8, 4]}, "rising"),
        ({"precompute_ref_log_probs": False, "reference_cache": "x"}, "set one of them back"),
    ],
)
def test_bad_objective(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceOptions(**values)
