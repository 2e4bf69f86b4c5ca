"""A disk without room ends in one line, whatever is written; what was there stays whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ic.checkpoint.folder import FolderCheckpointIO
from ic.files.atomic_write import write_json
from ic.files.json_lines import append_row
from ic.files.run_folder import RunFolder
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.tracking.csv_logger import read_metrics
from tests.checkpoint.test_folder import SIZES, as_checkpoint
from tests.conftest import SHORT

NO_SPACE = "No space left on device; free some space, or write to another disk"


@pytest.fixture
def full(mounted: Callable[[str], Path]) -> Path:
    folder = mounted("size=64k")
    with pytest.raises(OSError, match="No space left"):
        (folder / "fill").write_bytes(bytes(2**20))
    return folder


def test_fit_needs_room_from_the_start(
    ic: Callable[..., int], full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic(*SHORT, f"output_dir={full}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ic: {full / 'debug/default'}")
    assert NO_SPACE in line
    assert not [path for path in full.rglob("*") if path.is_file() and path.name != "fill"]


def test_fit_that_fills_the_disk(
    ic: Callable[..., int], mounted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for the metrics, none for a checkpoint."""
    folder = mounted("size=2m")
    options = ("callbacks.passkey=null", "callbacks.memory=null", "trainer.max_steps=2")
    assert ic(*SHORT, *options, f"output_dir={folder}") == 2
    error = capsys.readouterr().err
    assert "could not save the checkpoint" in error.splitlines()[-1]
    assert "Traceback" not in error
    run = RunFolder(folder / "debug/default")
    assert list(run.checkpoints.iterdir()) == []
    assert [row["step"] for row in read_metrics(run.metrics) if "train/loss" in row] == ["0", "1"]
    assert not run.lock.exists()


def test_evaluate(
    ic: Callable[..., int], full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**SIZES))
    io = FolderCheckpointIO(model.config, ByteTokenizer())
    io.save_checkpoint(as_checkpoint(model), tmp_path / "step=1")
    grid = ("evaluation.lengths=[128]", "evaluation.depths=[0.5]", "evaluation.samples=1")
    options = (f"checkpoint={tmp_path / 'step=1'}", f"output={full / 'e'}", "accelerator=cpu")
    assert ic("evaluate", *options, *grid) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"ic: {full / 'e'}")
    assert NO_SPACE in error.splitlines()[-1]
    assert "Traceback" not in error


def test_the_file_is_named(full: Path) -> None:
    """`write` itself does not know it."""
    (full / "there").touch()
    for write in (
        lambda file: write_json(file, {"a": "b" * 10_000}),
        lambda file: append_row(file, {"a": "b" * 10_000}),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write(full / "there")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(full / "there")
    assert sorted(os.listdir(full)) == ["fill", "there"]
