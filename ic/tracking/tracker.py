"""Trackers: loggers that show a run to people elsewhere, by way of a spool in the run's folder.

A server that is down holds nothing up and loses nothing.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from ic.files.run_folder import RunFolder
from ic.tracking.background import Background, Sender
from ic.tracking.identity import Identity
from ic.tracking.never_fails import NeverFails
from ic.tracking.parameters import LONG, as_parameters
from ic.tracking.provenance import Provenance, flatten
from ic.tracking.spool import STEP, TOKENS, X_AXIS, Spool, SpoolFolder

CONFIG, ENVIRONMENT, DIFF = "config.yaml", "environment.json", "commit.diff"
_CLOSE_S = 60.0  # that the end of a run waits for a server that answers


class Tracker(NeverFails, ABC):
    """Comes first among the bases, before Lightning's logger for the same tracker.

    What is logged goes to the spool. A thread sends it from there while the run is online, and the
    verb `sync` at any time.

    Attributes:
        KIND: name of the spool's folder.
        count_tokens: tokens that the run has trained on so far; they are the x axis of what is
            logged. None where nothing counts them.
    """

    PAUSE_S = 0.0  # only the disk can fail, and what it does not take waits in memory
    KIND: str
    count_tokens: Callable[[], int] | None = None
    _run_folder: RunFolder
    _identity: Identity
    _online = False
    _spool: Spool | None = None
    _background: Background | None = None

    @property
    def spool_folder(self) -> SpoolFolder:
        """Where the messages lie."""
        return SpoolFolder(self._run_folder, self.KIND)

    @abstractmethod
    def sender(self) -> Sender:
        """What tells the server."""

    @rank_zero_only
    def begin(self, start: Provenance) -> None:
        """Tell where this start of the run comes from; once training is sure to begin."""
        self._attempt(self._begin, start)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._attempt(self._log, metrics, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `begin` has told the whole configuration."""

    def save(self) -> None:
        if self._spool is not None:
            self._attempt(self._spool.sync)

    def finalize(self, status: str = "success") -> None:
        if status != "success":  # training has raised an error; nobody closes the logger
            self._end("FAILED")

    def log_picture(self, tag: str, picture: Path, step: int) -> None:
        self._add(picture, f"{tag}/step={step}{picture.suffix}")

    def log_csv(self, tag: str, table: Path, step: int) -> None:
        self._add(table, f"{tag}/step={step}{table.suffix}")

    def log_written(self, tag: str, text: str, step: int) -> None:
        if self._spool is not None:
            self._attempt(self._spool.add_text, text, f"{tag}/step={step}.txt")
            self._nudge()

    def close(self, finished: bool) -> None:
        self._end("FINISHED" if finished else "KILLED")

    def _begin(self, start: Provenance) -> None:
        self._identity.keep(self._run_folder)
        self._spool = spool = Spool(self.spool_folder)
        spool.set_status("RUNNING")
        spool.set_tags({**start.tags, X_AXIS: STEP if self.count_tokens is None else TOKENS})
        _log_parameters(spool, flatten(start.config))
        spool.add_text(yaml.safe_dump(dict(start.config), sort_keys=False), CONFIG)
        spool.add_text(json.dumps(dict(start.facts), indent=2) + "\n", ENVIRONMENT)
        if start.diff:
            spool.add_text(start.diff, DIFF)
        if self._online:
            self._background = Background(self.sender())
            self._background.start()

    def _log(self, metrics: Any, step: int | None) -> None:
        if self._spool is None:
            return
        numbers = {key: value for key, value in metrics.items() if not isinstance(value, str)}
        tokens = {} if self.count_tokens is None else {TOKENS: float(self.count_tokens())}
        self._spool.log_metrics({**numbers, **tokens}, step or 0)
        self._nudge()

    def _add(self, file: Path, name: str) -> None:
        if self._spool is not None:
            self._attempt(self._spool.add_file, file, name)
            self._nudge()

    def _nudge(self) -> None:
        if self._background is not None:
            self._background.nudge()

    @rank_zero_only
    def _end(self, status: str) -> None:
        if self._spool is None:
            return
        self._attempt(self._spool.set_status, status)
        self._attempt(self._spool.sync, True)
        background, self._spool, self._background = self._background, None, None
        if background is not None and not background.close(_CLOSE_S):
            rank_zero_warn(
                f"{background.name} has not been told everything: the rest waits in "
                f"{self.spool_folder.path}; send it with "
                f"python -m ic sync {self._run_folder.path}"
            )


def _log_parameters(spool: Spool, values: dict[str, str]) -> None:
    """Each parameter once: MLflow refuses another value of it, which a tag tells instead."""
    short, before = as_parameters(values), dict(spool.params)
    if new := {key: value for key, value in short.items() if key not in before}:
        spool.log_params(new)
    changed = {
        f"changed.{key}": f"{before[key]} -> {value}"
        for key, value in short.items()
        if before.get(key, value) != value
    }
    if changed:
        spool.set_tags(changed)
    if long := {key: value for key, value in values.items() if short.get(key) != value}:
        spool.add_text(json.dumps(long, indent=2) + "\n", LONG)
