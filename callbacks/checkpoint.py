"""Checkpoints: the last, the best, every n-th, and one on Ctrl-C.

    checkpoints/step=200/     a whole checkpoint (ic.checkpoint.folder)
    checkpoints/last -> step=200
    checkpoints/best -> step=150

`last` and `best` are links that move only once the folder they point to is on disk. Sharded
strategies write in the background; their links move at the first batch boundary after every rank
has written.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import signal
import time
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ic.callbacks.guardrails import Guardrails, first_bad_weight
from ic.callbacks.options import CheckpointOptions
from ic.checkpoint.commit import check_file_system, partial_path
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.rng import rng_state, set_rng_state
from ic.checkpoint.sharded_checkpoint import ShardedCheckpointStrategy
from ic.datamodules.workers import DataWorkerError
from ic.files.run_folder import RunFolder
from ic.parallel.agreement import Agreement
from ic.training.find_callback import find_callback
from ic.training.loops import validation_is_due

# What a shell reports for a program that Ctrl-C ended.
INTERRUPTED_EXIT_CODE = 130


class FolderCheckpoint(Checkpoint):
    """Saves at the end of steps, so that a resumed run continues exactly.

    A checkpoint is saved before the validation of its step, which a resumed run begins with; it
    needs the loops of `ic.training.loops`. The first Ctrl-C, on any rank, asks the run to stop
    after the current step and to save; the second ends it at once. `interrupted` tells afterwards.

    Attributes:
        saved_at: on rank 0, when the newest checkpoint of the run was on disk, in seconds since the
            epoch; None before the first.
    """

    def __init__(self, config: CheckpointOptions) -> None:
        self.config = config
        self.interrupted = False
        self._asked_to_stop = False  # this rank
        self._agreement = Agreement(1)
        self.best_score: float | None = None
        self.saved_at: float | None = None
        self._saved_step = -1
        self._links: set[str] = set()  # to move once the checkpoint of _saved_step is on disk
        self._rng_states: list[dict[str, Any]] | None = None  # of every rank, until the first batch
        self._rng_of_step: dict[str, Any] | None = None  # as the last step left it
        self._of_step: dict[str, Any] = {}  # loops and callbacks, if a validation follows
        self._previous_handler: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run = RunFolder(trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)
        self._agreement = Agreement(trainer.world_size)
        problem = None
        if trainer.is_global_zero:
            problem = check_file_system(self.run.checkpoints)
            if problem is None and self._rng_states is not None:
                # A kill may have come between a save and this.
                self._remove_old(trainer.global_step, among_later=False)
                if self.run.last.is_dir():
                    self.saved_at = self.run.last.stat().st_mtime
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise CheckpointError(problem)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not earlier: starting the data loaders draws random numbers.
        if self._rng_states is not None:
            self._restore_rng(trainer, self._rng_states)
            self._rng_states = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._settle(trainer, wait_for_it=False)

    def on_step_end(self, trainer: Trainer) -> None:
        # A `best` is saved within the validation, whose draws are undone behind it and which a
        # resume from it repeats.
        self._rng_of_step = rng_state()
        follows = self.config.monitor is not None and validation_is_due(trainer)
        self._of_step = _loops_and_callbacks(trainer) if follows else {}
        self.agree(trainer)
        if self.interrupted:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # a validation that is due comes first after the resume
        step = trainer.global_step
        is_last = trainer.should_stop or step == trainer.max_steps
        if step != self._saved_step and (is_last or step % self.config.every_n_steps == 0):
            self._save(trainer, "last")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.config.monitor is None or not fitting:
            return
        score = trainer.callback_metrics.get(self.config.monitor)
        if score is None:
            known = ", ".join(sorted(k for k in trainer.callback_metrics if k.startswith("val/")))
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.config.monitor!r}: the validation logs {known}"
            )
        better = self.best_score is None or (
            float(score) > self.best_score
            if self.config.mode == "max"
            else float(score) < self.best_score
        )
        if better and math.isfinite(score):  # after a NaN nothing would ever be better
            self.best_score = float(score)
            self._save(trainer, "last", "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not earlier: the evaluation after the training heeds Ctrl-C as well.
        self._restore_handler()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handler()
        if isinstance(exception, DataWorkerError):
            self._save_between_steps(trainer)
        if not self._links or isinstance(exception, KeyboardInterrupt):
            return
        # The ranks' writing threads finish a save without the training loop, so it is not lost.
        with contextlib.suppress(CheckpointError):
            if self._on_disk(trainer, wait_for_it=True) and trainer.is_global_zero:
                self._move_links(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [self._rng_of_step or rng_state()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            torch.distributed.all_gather_object(states, states[0])
        checkpoint["rng_states"] = states
        checkpoint.update(self._of_step)
        _end_step(checkpoint["loops"]["fit_loop"], trainer.global_step)
        # For `trained_length` in the model's configuration.
        checkpoint["context_length"] = getattr(trainer.datamodule, "context_length", None)  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._rng_states = checkpoint.get("rng_states")

    @property
    def asked(self) -> bool:
        return self._asked_to_stop

    def agree(self, trainer: Trainer) -> None:
        self.interrupted = bool(self._agreement.largest(self._asked_to_stop))

    def save(self, trainer: Trainer) -> None:
        """Save at this batch boundary, unless done, together on all ranks; point `last` to it.

        Returns once the checkpoint is on disk.

        Raises:
            CheckpointError: it could not be saved, or its weights are NaN or infinite; the one
                before is intact.
        """
        if trainer.global_step != self._saved_step:
            self._save(trainer, "last", at_end=True)
        self._settle(trainer, wait_for_it=True)

    def finish(self, trainer: Trainer) -> int:
        """Say how to go on -> exit code of an interrupted run."""
        rank_zero_info(f"interrupted; continue with {self.run.resume_command}")
        return INTERRUPTED_EXIT_CODE

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        rank_zero_info(
            "stopping after this step, or prompt, and saving; press Ctrl-C again to stop at once"
        )

    def _restore_handler(self) -> None:
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, self._previous_handler or signal.default_int_handler)

    def _save(self, trainer: Trainer, *links: str, at_end: bool = False) -> None:
        step = trainer.global_step
        if step != self._saved_step:
            self._settle(trainer, wait_for_it=True)
            if not self._worth_saving(trainer, at_end=at_end):
                return
            trainer.save_checkpoint(self.run.checkpoint(step))
            self._saved_step = step
        self._links.update(links)
        self._settle(trainer, wait_for_it=False)

    def _save_between_steps(self, trainer: Trainer) -> None:
        """Save what one process has when it asks for its next batch in vain."""
        micro_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        amid_a_step = micro_batches % trainer.accumulate_grad_batches
        if trainer.world_size > 1 or amid_a_step or not trainer.training:
            return
        with contextlib.suppress(CheckpointError):
            self.save(trainer)
            rank_zero_info(
                f"the checkpoint of step {trainer.global_step} is saved; continue with "
                f"{self.run.resume_command}"
            )

    def _worth_saving(self, trainer: Trainer, *, at_end: bool) -> bool:
        """Whether the weights are numbers. If not, the guardrails can still go back to some."""
        name = first_bad_weight(trainer)
        if name is None:
            return True
        message = (
            f"step {trainer.global_step}: the weights are NaN or infinite, the first in {name}. "
            "They are not saved; earlier checkpoints are intact"
        )
        if at_end or find_callback(trainer, Guardrails) is None:
            raise CheckpointError(
                f"{message}. Lower optimizer.lr, or look for the step where train/loss rises in "
                f"{self.run.metrics}"
            )
        rank_zero_warn(message)
        return False

    def _settle(self, trainer: Trainer, *, wait_for_it: bool) -> None:
        """Move the links that wait for a save, if it is on disk."""
        if not self._links:
            return
        if not self._on_disk(trainer, wait_for_it=wait_for_it):
            return
        if trainer.is_global_zero:
            self._move_links(trainer)
        self._links.clear()
        trainer.strategy.barrier("checkpoint")

    def _on_disk(self, trainer: Trainer, *, wait_for_it: bool) -> bool:
        strategy = trainer.strategy
        if not isinstance(strategy, ShardedCheckpointStrategy):
            return True
        try:
            return strategy.settle(wait_for_it=wait_for_it)
        except CheckpointError:
            self._links.clear()
            raise

    def _move_links(self, trainer: Trainer) -> None:
        for name in sorted(self._links):
            self._point(name)
        self.saved_at = time.time()
        self._remove_old(trainer.global_step)

    def _point(self, name: str) -> None:
        target = self.run.checkpoint(self._saved_step)
        if not target.is_dir():
            return  # nothing saved yet at the step that was resumed from
        link = target.with_name(f"{name}.partial-{os.getpid()}")
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(target.with_name(name))

    def _restore_rng(self, trainer: Trainer, states: list[dict[str, Any]]) -> None:
        if len(states) == trainer.world_size:
            set_rng_state(states[trainer.global_rank])
            return
        seed = (torch.initial_seed() + trainer.global_step) % 2**32
        seed_everything(seed, workers=True, verbose=False)
        rank_zero_info(
            f"the checkpoint holds random states of {len(states)} processes, this run has "
            f"{trainer.world_size}: seeded anew with {seed}"
        )

    def _remove_old(self, step: int, *, among_later: bool = True) -> None:
        kept = {os.readlink(p) for p in self.run.checkpoints.iterdir() if p.is_symlink()}
        every = self.config.keep_every_n_steps
        steps = set(self.run.saved_steps())
        # Later steps are of a run that was begun anew, or rolled back.
        so_far = {s for s in steps if s <= step}
        newest = sorted(so_far)[-self.config.keep_last :]
        for old in (steps if among_later else so_far).difference(newest):
            folder = self.run.checkpoint(old)
            if folder.name not in kept and not (every and old % every == 0):
                # Renamed first: what a kill leaves of it must not look like a whole checkpoint.
                gone = partial_path(folder)
                with contextlib.suppress(OSError):
                    folder.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)


def _loops_and_callbacks(trainer: Trainer) -> dict[str, Any]:
    """These parts of a checkpoint, as copies that a validation leaves alone."""
    loops = trainer._checkpoint_connector._get_loops_state_dict()
    return copy.deepcopy({"loops": loops, "callbacks": call._call_callbacks_state_dict(trainer)})


def _end_step(fit_loop: dict[str, Any], step: int) -> None:
    """Count as `on_train_batch_end` does, whichever hook saves.

    Lightning continues from a save made there with the right step; from one made after the
    validation it skips the next validation and is one step off in the loggers.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"] - 1
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
