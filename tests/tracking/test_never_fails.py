"""A logger that fails ends no training; it warns once and tries again."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from ic.files.run_folder import RunFolder
from ic.tracking.csv_logger import read_metrics
from ic.tracking.never_fails import NeverFails
from ic.tracking.tensorboard import TensorBoard
from tests.conftest import SHORT


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def steps(folder: Path, tag: str = "loss") -> list[int]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [event.step for event in found.Scalars(tag)]


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorBoard:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # given back afterwards
    monkeypatch.setattr(TensorBoard, "PAUSE_S", 0.0)
    return TensorBoard(tmp_path, name="", version="tensorboard")


def test_events_removed_while_running(board: TensorBoard, tmp_path: Path) -> None:
    board.log_metrics({"loss": 1.0}, 0)
    board.save()
    shutil.rmtree(tmp_path / "tensorboard")
    for step in (1, 2):
        board.log_metrics({"loss": 1.0}, step)
    board.finalize("success")
    assert steps(tmp_path / "tensorboard") == [1, 2]


def test_a_full_disk_is_one_warning(
    board: TensorBoard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """TensorBoard writes in a thread, which would print a traceback of its own."""
    board.log_metrics({"loss": 1.0}, 0)
    board.save()
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
        patch.setattr(RecordWriter, "write", no_space)
        for step in (1, 2, 3):
            board.log_metrics({"loss": 1.0}, step)
            board.save()
        board.log_hyperparams({"a": 1})
    (warning,) = (w for w in told if "failed" in str(w.message))
    assert str(warning.message).startswith(
        "TensorBoard failed: OSError: [Errno 28] No space left on device. Training goes on"
    )
    assert "Traceback" not in capfd.readouterr().err
    board.log_metrics({"loss": 1.0}, 4)
    board.finalize("success")
    newest = max((tmp_path / "tensorboard").glob("events.*"), key=lambda file: file.stat().st_ino)
    assert 4 in steps(newest.parent)


def test_pictures_are_shown(board: TensorBoard, tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    board.log_picture("heatmap", tmp_path / "a.png", 3)
    board.finalize("success")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Images("heatmap")] == [3]
    board.log_picture("heatmap", tmp_path / "gone.png", 4)


class Silent(NeverFails, Logger):
    """A tracker whose server does not answer."""

    name = version = "silent"
    tried = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._attempt(self._call)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(self._call)

    def _call(self) -> None:
        self.tried += 1
        raise TimeoutError


def test_a_failure_is_followed_by_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    logger = Silent()
    for _ in range(5):
        logger.log_metrics({}, 0)
    assert logger.tried == 1
    now += Silent.PAUSE_S
    logger.log_metrics({}, 0)
    assert logger.tried == 2


def test_training_goes_on(
    ic: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard fails from the second step on, at the pictures and at the end."""
    written = RecordWriter.write
    count = 0

    def write(self: Any, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 8:
            no_space()
        written(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    assert (
        ic(*SHORT, "callbacks.memory=null", "trainer.max_steps=3", "logger.tensorboard=true") == 0
    )
    run = RunFolder(tmp_path / "runs/debug/default")
    assert run.last.resolve().name == "step=3"
    losses = [row["step"] for row in read_metrics(run.metrics) if "train/loss" in row]
    assert losses == ["0", "1", "2"]
    assert run.results.is_file()
    assert count > 8
