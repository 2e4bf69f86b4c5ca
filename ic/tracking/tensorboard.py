"""TensorBoard for a run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread  # type: ignore[import-untyped]

from ic.tracking.never_fails import NeverFails


class TensorBoard(NeverFails, TensorBoardLogger):
    """TensorBoard; with events that were removed it goes on in a new file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _keep_quiet(_AsyncWriterThread)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self._experiment is not None and not any(Path(self.log_dir).glob("events.*")):
            self._begin_anew()
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_picture(self, tag: str, picture: Path, step: int) -> None:
        def add() -> None:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            self.experiment.add_image(tag, pixels, step, dataformats="HWC")

        self._attempt(add)

    @rank_zero_only
    def log_written(self, tag: str, text: str, step: int) -> None:
        # It shows Markdown; as a block of code the text keeps its lines.
        block = "\n".join(f"    {line}" for line in text.splitlines())
        self._attempt(lambda: self.experiment.add_text(tag, block, step))

    def _begin_anew(self) -> None:
        self._experiment = None


def _keep_quiet(kind: type[threading.Thread]) -> None:
    """Print no traceback of a thread that tells its owner what failed."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.thread, kind):
            before(args)

    threading.excepthook = hook
