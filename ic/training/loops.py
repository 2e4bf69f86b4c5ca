"""Lightning's loops, with what makes a resumed run equal to one that was never stopped.

Lightning's own hooks end before a step does: `on_train_batch_end` runs before the step's metrics
are with the loggers, so that a checkpoint saved there could be resumed without their row. And its
validation draws from the generators that the training uses.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

from lightning import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.utilities.seed import isolate_rng


@runtime_checkable
class EndsSteps(Protocol):
    """A callback that acts between an optimizer step and the validation that may follow."""

    def on_step_end(self, trainer: Trainer) -> None:
        """The step is over and its metrics are with the loggers."""


class StepLoop(_TrainingEpochLoop):
    """Tells callbacks when a step has ended; keeps the generators over a validation."""

    def advance(self, data_fetcher: Any) -> None:
        super().advance(data_fetcher)
        if not self._should_accumulate():
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EndsSteps):
                    callback.on_step_end(self.trainer)

    def on_advance_end(self, data_fetcher: Any) -> None:
        # Not after every micro-batch: the states of all generators are copied out and back.
        with isolate_rng() if self._should_check_val_fx(data_fetcher) else nullcontext():
            super().on_advance_end(data_fetcher)


class ResumableFitLoop(_FitLoop):
    """A run that continues from step N begins with the validation of step N, if one is due there.

    Checkpoints are saved before it, so it may have been cut. A run that has taken all its steps
    still has its end: what `on_train_end` does may have been cut as well.
    """

    @property
    def skip(self) -> bool:
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0

    def on_run_start(self) -> None:
        super().on_run_start()
        loop, trainer = self.epoch_loop, self.trainer
        if loop.global_step == 0 or not validation_is_due(trainer):
            return
        trainer.validating = True
        loop.val_loop.restarting = False
        with isolate_rng():
            loop.val_loop.run()
        trainer.training = True


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the step that has ended."""
    loop = trainer.fit_loop.epoch_loop
    if not loop._should_check_val_epoch():
        return False
    assert trainer.val_check_batch is not None  # no interval of ours is a time
    due = loop.batch_progress.total.ready % trainer.val_check_batch == 0
    return due or trainer.should_stop  # a run that ends by time is validated at its end


class FirstAndLastStepLogs(_LoggerConnector):
    """Logs the first and the last step too, so that the shortest run has a loss."""

    @property
    def should_update_logs(self) -> bool:
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return step in (1, self.trainer.max_steps) or super().should_update_logs


def use_resumable_loops(trainer: Trainer) -> Trainer:
    """Give a new trainer the loops of this module."""
    given = trainer.fit_loop
    loop = ResumableFitLoop(trainer, min_epochs=given.min_epochs, max_epochs=given.max_epochs)
    loop.epoch_loop = StepLoop(trainer, min_steps=given.min_steps, max_steps=given.max_steps)
    trainer.fit_loop = loop
    trainer._logger_connector = FirstAndLastStepLogs(trainer)
    return trainer
