"""Weights & Biases for a run: one W&B run across all its starts."""

from __future__ import annotations

from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import WandbLogger

from ic.files.run_folder import RunFolder
from ic.tracking.identity import Identity
from ic.tracking.never_fails import NeverFails
from ic.tracking.tracker import Tracker
from ic.tracking.wandb_sender import WandbSender

# How long a server may keep the thread that sends waiting.
_INIT_S, _FINISH_S = 30.0, 45.0


class WeightsAndBiases(Tracker, WandbLogger):
    """Lightning's logger begins the run there, in the thread that sends.

    W&B's own offline files are not used. What a killed process had not handed to the disk is
    missing in them, and `wandb sync` stops at a file that ends amid a record: it sends no later
    one (wandb 0.31).

    Args:
        folder: of the run.
        identity: of the run.
        online: whether to send while training.
        settings: what `wandb.init` takes beside: name, project, group, job_type, tags.
    """

    KIND = "wandb"

    def __init__(
        self, folder: RunFolder, identity: Identity, online: bool, **settings: Any
    ) -> None:
        import wandb

        super().__init__(
            save_dir=folder.path,
            id=identity.wandb_id,
            resume="allow",
            # Lightning's `offline` sets a variable for whatever comes later in this process.
            mode="online",
            settings=wandb.Settings(
                init_timeout=_INIT_S, finish_timeout=_FINISH_S, finish_timeout_raises=True
            ),
            **settings,
        )
        self._run_folder, self._identity, self._online = folder, identity, online

    @property
    def experiment(self) -> Any:
        """W&B's run once it has begun."""
        return _DummyExperiment() if self._experiment is None else self._experiment

    def sender(self) -> WandbSender:
        return WandbSender(self.spool_folder, self._begin_there)

    def _begin_there(self) -> Any:
        self._experiment = None
        return super(NeverFails, self).experiment
