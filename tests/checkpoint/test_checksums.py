"""One bit of any file of a checkpoint is noticed; weights that are no numbers are refused."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ic.checkpoint.checksums import CHECKSUMS
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.finite import first_not_finite
from ic.checkpoint.folder import FolderCheckpointIO, load_model
from ic.checkpoint.source import find_source
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.adapter import add_adapter
from ic.model.byte_tokenizer import ByteTokenizer
from ic.model.options import AdapterOptions
from tests.checkpoint.test_folder import SIZES, as_checkpoint

FILES = ("config.json", "model.safetensors", "trainer.pt", "tokenizer_config.json")


@pytest.fixture
def model() -> MLAForCausalLM:
    torch.manual_seed(0)
    return MLAForCausalLM(MLAConfig(**SIZES))


@pytest.fixture
def saved(model: MLAForCausalLM, tmp_path: Path) -> Path:
    """Step 7 of a run that also kept step 3."""
    io = FolderCheckpointIO(model.config, ByteTokenizer())
    for step in (3, 7):
        state = {**as_checkpoint(model), "context_length": 64}
        io.save_checkpoint(state, tmp_path / f"checkpoints/step={step}")
    return tmp_path / "checkpoints/step=7"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_sha256sum_agrees(saved: Path) -> None:
    lines = (saved / CHECKSUMS).read_text().splitlines()
    listed = {line.partition("  ")[2] for line in lines}
    assert listed == {path.name for path in saved.iterdir()} - {CHECKSUMS}
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=saved, check=True)


@pytest.mark.parametrize("name", [*FILES, CHECKSUMS])
def test_a_flipped_bit_is_refused(model: MLAForCausalLM, saved: Path, name: str) -> None:
    """With the file's name, and the checkpoint to go back to."""
    flip(saved / name)
    io = FolderCheckpointIO(model.config, ByteTokenizer())
    with pytest.raises(CheckpointError, match="is truncated or damaged") as caught:
        io.load_checkpoint(saved)
    if name != CHECKSUMS:  # there it is the file whose line was hit
        assert f"{saved / name} is truncated" in str(caught.value)
    assert str(caught.value).endswith(f"the checkpoint before it, {saved.parent / 'step=3'}")
    assert io.load_checkpoint(saved.parent / "step=3")["global_step"] == 7


@pytest.mark.parametrize("name", FILES)
def test_evaluation_does_not_read_the_training_state(
    saved: Path, name: str, tmp_path: Path
) -> None:
    flip(saved / name)
    if name == "trainer.pt":
        load_model(saved)
        assert export_checkpoint(find_source(saved), tmp_path / "out")
        assert not (tmp_path / "out" / CHECKSUMS).exists()
        return
    for read in (load_model, lambda folder: export_checkpoint(find_source(folder), tmp_path / "o")):
        with pytest.raises(CheckpointError, match=f"{name} (is truncated or damaged|cannot be)"):
            read(saved)


def test_an_adapter_is_checked(model: MLAForCausalLM, tmp_path: Path) -> None:
    options = AdapterOptions()
    add_adapter(model, options)
    io = FolderCheckpointIO(model.config, ByteTokenizer(), options)
    io.save_checkpoint(as_checkpoint(model), tmp_path / "step=1")
    io.load_checkpoint(tmp_path / "step=1")
    flip(tmp_path / "step=1/adapter/adapter_model.safetensors")
    for read in (io.load_checkpoint, load_model):
        with pytest.raises(CheckpointError, match="adapter_model.safetensors is truncated or dam"):
            read(tmp_path / "step=1")


def test_a_folder_of_an_earlier_version_has_no_checksums(
    model: MLAForCausalLM, saved: Path
) -> None:
    (saved / CHECKSUMS).unlink()
    state = FolderCheckpointIO(model.config, ByteTokenizer()).load_checkpoint(saved)
    assert state["state_dict"]["model.lm_head.weight"].equal(model.lm_head.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_not_resumed(
    model: MLAForCausalLM, saved: Path, value: float
) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = value
    io = FolderCheckpointIO(model.config, ByteTokenizer())
    io.save_checkpoint(as_checkpoint(model), saved)
    with pytest.raises(CheckpointError, match="NaN or infinite, the first in .*layers.1.mlp.up_pr"):
        io.load_checkpoint(saved)


def test_only_floating_point_tensors_can_be_infinite() -> None:
    tensors = {"step": torch.tensor(3), "empty": torch.zeros(0), "w": torch.ones(2)}
    assert first_not_finite(tensors) is None
    assert first_not_finite({}) is None
    assert first_not_finite({**tensors, "v": torch.tensor([1.0, math.nan]).bfloat16()}) == "v"


@pytest.fixture(params=[0o022, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_of_the_umask(
    umask: int, model: MLAForCausalLM, tmp_path: Path
) -> None:
    """safetensors makes its files for their owner alone."""
    options = AdapterOptions()
    add_adapter(model, options)
    io = FolderCheckpointIO(model.config, ByteTokenizer(), options)
    io.save_checkpoint(as_checkpoint(model), tmp_path / "step=1")
    export_checkpoint(find_source(tmp_path / "step=1"), tmp_path / "out")
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777
        for folder in ("step=1", "out")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    }
    assert "step=1/adapter/adapter_model.safetensors" in modes
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_a_copy_is_read_again(
    model: MLAForCausalLM, saved: Path, ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found intact once is not taken for another folder."""
    load_model(saved)
    copy = shutil.copytree(saved, saved.parent / "step=9")
    flip(copy / "model.safetensors")
    assert ic("generate", f"checkpoint={copy}", "prompt=x", "accelerator=cpu") == 2
    assert "step=9/model.safetensors is truncated or damaged" in capsys.readouterr().err
