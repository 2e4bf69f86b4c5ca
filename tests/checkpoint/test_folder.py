"""Checkpoints are whole or absent, and say what is wrong with them."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ic.checkpoint.checksums import CHECKSUMS, write_checksums
from ic.checkpoint.folder import (
    CheckpointError,
    FolderCheckpointIO,
    load_config,
    load_model,
    trained_length,
)
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.adapter import add_adapter
from ic.model.byte_tokenizer import ByteTokenizer
from ic.model.options import AdapterOptions

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def io_of(model: MLAForCausalLM) -> FolderCheckpointIO:
    return FolderCheckpointIO(model.config, ByteTokenizer())


def as_checkpoint(model: MLAForCausalLM) -> dict:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"state_dict": state, "global_step": 7, "nested": {"x": torch.ones(2)}}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> MLAForCausalLM:
    torch.manual_seed(0)
    return MLAForCausalLM(MLAConfig(**SIZES, tie_word_embeddings=request.param))


@pytest.fixture
def saved(model: MLAForCausalLM, tmp_path: Path) -> Path:
    io_of(model).save_checkpoint(as_checkpoint(model), tmp_path / "step=7")
    return tmp_path / "step=7"


def test_round_trip(model: MLAForCausalLM, saved: Path) -> None:
    state = io_of(model).load_checkpoint(saved)
    assert state["global_step"] == 7
    assert state["nested"]["x"].equal(torch.ones(2))
    expected = as_checkpoint(model)["state_dict"]
    assert state["state_dict"].keys() == expected.keys()
    assert all(state["state_dict"][k].equal(v) for k, v in expected.items())
    assert [p.name for p in saved.parent.iterdir()] == ["step=7"]


def test_folder_stands_alone(model: MLAForCausalLM, saved: Path, tmp_path: Path) -> None:
    (saved / "trainer.pt").unlink()
    moved = shutil.move(saved, tmp_path / "elsewhere")
    x = torch.tensor([[1, 2, 3]])
    for loaded in (load_model(Path(moved)), AutoModelForCausalLM.from_pretrained(moved)):
        assert loaded(x).logits.equal(model(x).logits)
    assert isinstance(AutoTokenizer.from_pretrained(moved), ByteTokenizer)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_truncated(model: MLAForCausalLM, saved: Path, file: str) -> None:
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{file} is truncated or damaged"):
        io_of(model).load_checkpoint(saved)
    if file == "model.safetensors":
        with pytest.raises(CheckpointError, match=f"{file} is truncated or damaged"):
            load_model(saved)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt", "config.json"])
def test_incomplete(model: MLAForCausalLM, saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=f"it holds no {file}"):
        io_of(model).load_checkpoint(saved)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_config(tmp_path / "nowhere")


def test_other_architecture(saved: Path) -> None:
    other = MLAForCausalLM(MLAConfig(**{**SIZES, "hidden_size": 48, "num_hidden_layers": 3}))
    with pytest.raises(
        CheckpointError, match=r"hidden_size 32 \(configured 48\).*num_hidden_layers 2"
    ):
        io_of(other).load_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 300),
        ("intermediate_size", 96),
        ("num_attention_heads", 4),
        ("q_lora_rank", 8),
        ("kv_lora_rank", 24),
        ("qk_nope_head_dim", 16),
        ("qk_rope_head_dim", 8),
        ("v_head_dim", 16),
        # No tensor has another shape with these, so nothing else would notice.
        ("rope_interleave", False),
        ("length_temperature", "llama4"),
        ("nope_layers", [1]),
        ("rope_repeats", 2),
        # Others add tensors or take them away.
        ("attention_bias", True),
        ("latent_norm", False),
        ("query_bias", True),
        ("qk_norm_dim", 4),
    ],
)
def test_each_part_of_an_architecture_counts(tmp_path: Path, key: str, value: object) -> None:
    plain = MLAForCausalLM(MLAConfig(**SIZES))
    io_of(plain).save_checkpoint(as_checkpoint(plain), tmp_path / "step=7")
    other = FolderCheckpointIO(MLAConfig(**{**SIZES, key: value}), ByteTokenizer())
    with pytest.raises(CheckpointError, match=f"is of another architecture: {key} "):
        other.load_checkpoint(tmp_path / "step=7")


def test_the_frequencies_of_a_narrow_rotary_key_count(tmp_path: Path) -> None:
    config = MLAConfig(**SIZES, rope_pairs=[1, 0], rope_pairs_dim=16)
    model = MLAForCausalLM(config)
    io_of(model).save_checkpoint(as_checkpoint(model), tmp_path / "step=7")
    assert io_of(model).load_checkpoint(tmp_path / "step=7")["global_step"] == 7
    other = MLAConfig(**SIZES, rope_pairs=[1, 2], rope_pairs_dim=16)
    with pytest.raises(CheckpointError, match=r"architecture: rope_pairs \[1, 0\] .*\[1, 2\]"):
        FolderCheckpointIO(other, ByteTokenizer()).load_checkpoint(tmp_path / "step=7")


@pytest.mark.parametrize(
    "changes", [{"r": 4}, {"lora_alpha": 8.0}, {"use_rslora": True}, {"target_modules": ["o_proj"]}]
)
def test_an_adapter_of_other_settings_is_refused(tmp_path: Path, changes: dict) -> None:
    options = AdapterOptions(r=2, lora_alpha=4.0, target_modules=["q_proj", "o_proj"])
    model = MLAForCausalLM(MLAConfig(**SIZES))
    add_adapter(model, options)
    with_adapter = FolderCheckpointIO(model.config, ByteTokenizer(), options)
    with_adapter.save_checkpoint(as_checkpoint(model), tmp_path / "step=7")
    assert with_adapter.load_checkpoint(tmp_path / "step=7")["global_step"] == 7
    other = FolderCheckpointIO(model.config, ByteTokenizer(), replace(options, **changes))
    with pytest.raises(CheckpointError, match="holds an adapter of other settings"):
        other.load_checkpoint(tmp_path / "step=7")


def test_more_layers_than_the_configuration(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (saved / CHECKSUMS).unlink()
    with pytest.raises(
        CheckpointError, match=r"no place for, the first is model\.layers\.1\.input"
    ):
        load_model(saved)


def test_a_lost_tensor_is_named(model: MLAForCausalLM, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    write_checksums(saved)
    named = "lacks 1 tensors, the first is model.layers.1.mlp.up_proj.weight$"
    for load in (io_of(model).load_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=named):
            load(saved)
    weights |= {"model.layers.1.mlp.up_proj.weight": lost, "other": lost.clone()}
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    write_checksums(saved)
    with pytest.raises(CheckpointError, match="no place for, the first is other: is it of another"):
        io_of(model).load_checkpoint(saved)


def test_other_model_type(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (saved / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match="holds a model of type 'llama'"):
        load_model(saved)


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """A real refusal of the kernel to write past 20 kB; the same errno path as a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_the_previous_checkpoint(
    model: MLAForCausalLM, saved: Path, full_disk: Callable[[], None]
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    full_disk()
    for target in (saved, saved.parent / "step=8"):
        with pytest.raises(CheckpointError, match="could not save.*Earlier checkpoints are intact"):
            io_of(model).save_checkpoint(as_checkpoint(model), target)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["step=7"]
    assert io_of(model).load_checkpoint(saved)["global_step"] == 7


def test_the_longest_trained_length_is_kept(model: MLAForCausalLM, tmp_path: Path) -> None:
    """A run that goes on at a shorter length, after a resume too, was trained at the longest."""
    first, second = io_of(model), io_of(copy.deepcopy(model))
    for step, length in enumerate((512, 2048, 1024)):
        state = {**as_checkpoint(model), "context_length": length}
        first.save_checkpoint(state, tmp_path / f"step={step}")
        longest = min(4**step * 512, 2048)
        assert load_config(tmp_path / f"step={step}").trained_length == longest
    second.config.trained_length = None
    second.load_checkpoint(tmp_path / "step=2")
    second.save_checkpoint({**as_checkpoint(model), "context_length": 256}, tmp_path / "step=3")
    assert trained_length(tmp_path / "step=3") == 2048
