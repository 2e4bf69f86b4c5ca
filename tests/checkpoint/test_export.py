"""The exported folder is what the run had in memory, by transformers' own loading."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from ic.checkpoint import commit, export
from ic.checkpoint.checksums import CHECKSUMS
from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.folder import (
    CheckpointError,
    FolderCheckpointIO,
    load_config,
    load_model,
    trained_length,
)
from ic.checkpoint.source import find_source
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SMALL, randomize

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(four: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint of four ranks that nothing but the folder itself describes."""
    return shutil.copytree(four / "runs/debug/four/checkpoints/step=2", tmp_path / "step=2")


@pytest.fixture
def in_memory(four: Path) -> MLAForCausalLM:
    """The model as the run held it in memory when it saved."""
    model = MLAForCausalLM(load_config(four / "runs/debug/four/checkpoints/step=2"))
    held = torch.load(four / "four.probe/step=2.pt", weights_only=True)
    names = model.state_dict().keys()
    model.load_state_dict({name: held[f"model.{name}"] for name in names})
    return model.eval()


IDS = torch.arange(60, 90)[None]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["5GB", "500KB"])
def test_equals_the_model_in_memory(
    ic: Callable[..., int],
    checkpoint: Path,
    in_memory: MLAForCausalLM,
    size: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    output = tmp_path / "out"
    assert (
        ic("export", f"checkpoint={checkpoint}", f"output={output}", f"max_shard_size={size}") == 0
    )
    assert f"MB: {output}" in capsys.readouterr().out
    files = sorted(p.name for p in output.glob("*.safetensors"))
    if size == "5GB":
        assert files == ["model.safetensors"]
    else:
        assert len(files) > 2
        assert all((output / file).stat().st_size < 520_000 for file in files)
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
    loaded = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        assert loaded(IDS).logits.equal(in_memory(IDS).logits)
    assert isinstance(AutoTokenizer.from_pretrained(output), ByteTokenizer)
    assert not [p for p in output.iterdir() if p.name.startswith(("__", ".")) or p.suffix == ".pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "step=2"]


def test_dtype(checkpoint: Path, in_memory: MLAForCausalLM, tmp_path: Path) -> None:
    export_checkpoint(find_source(checkpoint), tmp_path / "half", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in in_memory.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor.bfloat16()), name


def test_used_directly(ic: Callable[..., int], checkpoint: Path, in_memory: MLAForCausalLM) -> None:
    with torch.no_grad():
        assert load_model(checkpoint)(IDS).logits.equal(in_memory(IDS).logits)
    assert ic("generate", f"checkpoint={checkpoint}", "prompt=key", "max_new_tokens=2") == 0


@pytest.mark.parametrize("tied", [False, True])
def test_of_an_unsharded_folder(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**{**SMALL, "tie_word_embeddings": tied})).eval()
    randomize(model)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    FolderCheckpointIO(model.config, ByteTokenizer()).save_checkpoint(
        {"state_dict": state}, tmp_path / "step=1"
    )
    (tmp_path / "step=1/code.py").touch()
    settings = json.loads((tmp_path / "step=1/tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    (tmp_path / "step=1/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "step=1" / CHECKSUMS).unlink()
    (file,) = export_checkpoint(find_source(tmp_path / "step=1"), tmp_path / "out")
    assert ("lm_head.weight" in load_file(file)) != tied
    # Without extensions it is DeepSeek-V3's, and ours reads it back.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is DeepseekV3ForCausalLM
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=0)
        assert load_model(tmp_path / "out")(IDS).logits.equal(expected)
    assert not list((tmp_path / "out").glob("*.py"))
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "out"), ByteTokenizer)
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_existing_output(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(CheckpointError, match="exists: choose another folder, or .*overwrite=true"):
        export_checkpoint(find_source(checkpoint), output)
    export_checkpoint(find_source(checkpoint), output, overwrite=True)  # it is empty
    (output / "config.json").write_text("{}")
    export_checkpoint(find_source(checkpoint), output, overwrite=True)
    assert load_config(output)
    (output / "precious").touch()
    with pytest.raises(CheckpointError, match="more than an export, such as precious"):
        export_checkpoint(find_source(checkpoint), output, overwrite=True)
    assert (output / "precious").exists()
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "link").symlink_to(output)
    for other, message in (
        (copy, "is no export"),
        (file, "is a file"),
        (tmp_path / "link", "is a link"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(find_source(checkpoint), other, overwrite=True)
    assert load_model(copy)
    with pytest.raises(CheckpointError, match="is the checkpoint: choose another"):
        export_checkpoint(find_source(checkpoint), checkpoint, overwrite=True)


def test_a_wrong_output_is_refused_before_anything_is_loaded(
    checkpoint: Path, tmp_path: Path
) -> None:
    script = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from ic.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    given = [f"checkpoint={checkpoint}", f"output={tmp_path}/out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    for args, message in (
        (given, "exists: choose another"),
        ([*given, "overwrite=true"], "no export"),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", script, "export", *args], capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (2, "False\n")
        assert message in ended.stderr


def test_tells_progress(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = export_checkpoint(
        find_source(checkpoint),
        tmp_path / "out",
        max_shard_size="500KB",
        on_bytes=lambda *at: seen.append(at),
    )
    assert len(seen) == len(files)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for f in files for t in load_file(f).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_shard_size": "5 parsecs"}, "max_shard_size='5 parsecs'"),
        ({"dtype": "int3"}, "dtype='int3': choose one of float32"),
        ({"checkpoint": "nowhere"}, "no checkpoint folder nowhere"),
    ],
)
def test_bad_input(
    ic: Callable[..., int], checkpoint: Path, changes: dict[str, str], message: str, capsys: Capture
) -> None:
    given = {"checkpoint": str(checkpoint), "output": "out"} | changes
    assert ic("export", *(f"{key}={value}" for key, value in given.items())) == 2
    assert message in capsys.readouterr().err


def test_other_dimensions_than_the_configuration(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 99}))
    (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight is \(128, 99\) by the conf"):
        export_checkpoint(find_source(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_the_checkpoint(four: Path, tmp_path: Path) -> None:
    run = shutil.copytree(four / "runs/debug/four", tmp_path / "run", symlinks=True)
    before = sorted(run.rglob("*"))
    for output in (run, run / "checkpoints", run / "checkpoints/step=5"):
        with pytest.raises(CheckpointError, match="the checkpoint: choose another folder"):
            export_checkpoint(find_source(run), output, overwrite=True)
    assert sorted(run.rglob("*")) == before


def test_the_trained_length_survives(ic: Callable[..., int], four: Path, tmp_path: Path) -> None:
    """Four ranks trained at 128 tokens. An older folder says it in the trainer's state alone."""
    run = shutil.copytree(four / "runs/debug/four", tmp_path / "run", symlinks=True)
    last = run / "checkpoints/last"
    config = json.loads((last / "config.json").read_text())
    assert config["trained_length"] == 128
    for saved in (config, {k: v for k, v in config.items() if k != "trained_length"}):
        (last / "config.json").write_text(json.dumps(saved))
        (last / CHECKSUMS).unlink(missing_ok=True)  # an older folder has none
        output = tmp_path / str(len(saved))
        assert ic("export", f"checkpoint={run}", f"output={output}") == 0
        assert trained_length(output) == 128
        AutoModelForCausalLM.from_pretrained(output)
    state = torch.load(last / "trainer.pt", weights_only=True)
    del state["context_length"]
    torch.save(state, last / "trainer.pt")
    assert trained_length(last) == 128  # of the datamodule's state
    state.pop("PasskeyDataModule")
    torch.save(state, last / "trainer.pt")
    assert trained_length(last) is None


def test_a_refusal_of_the_file_system_is_named_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(commit, "commit_folder", refused)
    with pytest.raises(CheckpointError, match="Permission denied"):
        export_checkpoint(find_source(checkpoint), tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("cause", "said"),
    [(None, "header too large"), (OSError(errno.EROFS, "Read-only"), "[Errno 30] Read-only")],
)
def test_what_stopped_an_export_is_said(
    cause: OSError | None,
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operating system's word, if it had one."""

    def broken(*_: object, **__: object) -> None:
        raise SafetensorError("header too large") from cause

    monkeypatch.setattr(export, "save_file", broken)
    output = tmp_path / "new" / "deep" / "out"
    with pytest.raises(CheckpointError, match=re.escape(f"could not export to {output}: {said}. ")):
        export_checkpoint(find_source(checkpoint), output)
    assert not list(output.parent.iterdir())
