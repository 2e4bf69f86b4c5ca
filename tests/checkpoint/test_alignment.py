"""Sharded checkpoints of LoRA and of preference training: other numbers of ranks go on from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ic.checkpoint.folder import load_model
from ic.checkpoint.storage import ShardReader
from tests.checkpoint.ranks import run_ranks
from tests.training.conftest import PAIRS, write_jsonl

FIT = (
    "experiment=dpo_tiny",
    "data.context_length=128",
    "data.tokens_per_batch=512",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "callbacks.memory=null",
    "trainer.num_sanity_val_steps=0",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.checkpoint.keep_every_n_steps=2",
    "logger.tensorboard=false",
    "optimizer.warmup_steps=0",
    "optimizer.name=adamw",
)
SHARED = ("strategy=fsdp2", "strategy.context_parallel_size=2")
LORA = ("model/adapter=lora", "model.adapter.r=3")
IN_MEMORY = "preference.precompute_ref_log_probs=false"


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., str]:
    """Run `fit` on some ranks -> what they printed."""
    write_jsonl(tmp_path / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "val.jsonl", PAIRS[:2])
    files = ("data.train_files=[train.jsonl]", "data.val_files=[val.jsonl]")

    def run(num_processes: int, run_id: str, *args: str) -> str:
        codes, output = run_ranks(tmp_path, num_processes, *FIT, *files, f"run_id={run_id}", *args)
        assert codes == [0] * num_processes, output
        return output

    return run


def step(folder: Path, run: str, number: int) -> Path:
    return folder / "runs/dpo_tiny" / run / "checkpoints" / f"step={number}"


def same_state(folder: Path, one: str, other: str) -> None:
    """Weights and optimizer state after the last step, up to the rounding of sums."""
    ours, theirs = (
        torch.load(folder / f"{run}.probe/step=4.pt", weights_only=True) for run in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_lora_saved_by_two_ranks(
    fit: Callable[..., str], ic: Callable[..., int], tmp_path: Path
) -> None:
    output = fit(2, "two", *SHARED, *LORA)
    assert "sync_dist" not in output
    # The reference is the same to a run on one device: it reads the file.
    cache = f"preference.reference_cache={tmp_path / 'runs/dpo_tiny/two/reference.jsonl'}"
    saved = step(tmp_path, "two", 2)
    output = fit(1, "one", *LORA, cache, f"ckpt_path={saved}")
    assert "reference log-probabilities" not in output
    same_state(tmp_path, "two", "one")
    fit(2, "again", *SHARED, *LORA, cache, f"ckpt_path={saved}", "trainer.max_steps=3")
    ended, started = (
        torch.load(tmp_path / probe, weights_only=True)
        for probe in ("two.probe/step=2.pt", "again.probe/start.pt")
    )
    assert started.keys() == ended.keys()
    assert all(tensor.equal(ended[name]) for name, tensor in started.items())
    last = [step(tmp_path, run, 4) for run in ("two", "one")]
    adapters = [load_file(folder / "adapter/adapter_model.safetensors") for folder in last]
    assert adapters[0].keys() == adapters[1].keys()
    merged = [load_model(folder).state_dict() for folder in last]
    base = load_file(last[1] / "model.safetensors")
    assert merged[0].keys() == merged[1].keys() == base.keys()
    assert not merged[0]["model.layers.0.self_attn.o_proj.weight"].equal(
        base["model.layers.0.self_attn.o_proj.weight"]
    )
    assert ic("export", f"checkpoint={last[0]}", "output=exported") == 0
    exported = load_file(tmp_path / "exported/model.safetensors")
    for name in base:
        torch.testing.assert_close(merged[0][name], merged[1][name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(exported[name], merged[0][name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_frozen_reference_is_in_no_checkpoint(fit: Callable[..., str], tmp_path: Path) -> None:
    fit(1, "one", IN_MEMORY)
    fit(2, "two", *SHARED, IN_MEMORY, f"ckpt_path={step(tmp_path, 'one', 2)}")
    same_state(tmp_path, "one", "two")
    metadata = ShardReader(step(tmp_path, "two", 4)).read_metadata()
    assert metadata.state_dict_metadata
    assert not [name for name in metadata.state_dict_metadata if "reference" in name]
