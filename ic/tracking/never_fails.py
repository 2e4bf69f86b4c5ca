"""Loggers whose failures end no training.

A full disk, a folder that someone removed, a server that does not answer: the first failure of a
logger is a warning, and later calls try again. Training goes on to its next checkpoint, which tells
on its own account if the disk is full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class NeverFails(Logger):
    """Comes first among the bases: `class L(NeverFails, SomeLogger)`.

    Attributes:
        PAUSE_S: how long after a failure nothing is tried, so that a full disk does not fill with
            empty files and a silent server does not hold up every step.
    """

    PAUSE_S = 60.0
    _paused_until = 0.0
    _has_warned = False

    @property
    def experiment(self) -> Any:
        made: Any = None
        if not self._paused():
            made = self._attempt(lambda: super(NeverFails, self).experiment)  # type: ignore[misc]
        return _DummyExperiment() if made is None else made

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._attempt(super().log_metrics, metrics, step)  # type: ignore[safe-super]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_hyperparams, *args, **kwargs)  # type: ignore[safe-super]

    def save(self) -> None:
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        self._attempt(super().finalize, status)

    def log_picture(self, tag: str, picture: Path, step: int) -> None:
        """Show a picture, where the logger can."""

    def log_written(self, tag: str, text: str, step: int) -> None:
        """Show a text, where the logger can."""

    def log_csv(self, tag: str, table: Path, step: int) -> None:
        """Show a table that lies in a CSV file, where the logger can."""

    def close(self, finished: bool) -> None:
        """End what it began, so that the next run in this process begins its own.

        Args:
            finished: the run is at its end, and is not to be continued.
        """

    def _attempt(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the operation returns; None if it fails or is not tried."""
        if self._paused():
            return None
        try:
            return operation(*args, **kwargs)
        except Exception as error:  # whatever a tracker's library raises
            self._paused_until = time.monotonic() + self.PAUSE_S
            self._begin_anew()
            if not self._has_warned:
                self._has_warned = True
                rank_zero_warn(
                    f"{type(self).__name__} failed: {type(error).__name__}: {error}. Training goes "
                    "on; what it could not log may be missing, and it tries again"
                )
            return None

    def _paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _begin_anew(self) -> None:
        """Forget what failed, so that the next attempt opens it again."""
