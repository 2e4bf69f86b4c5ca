"""Save, requeue and continue: what a run does when SLURM takes its machines away.

A signal handler only sets a flag. At the next batch boundary the ranks agree by an all-reduce over
gloo, save one checkpoint together, and stop; rank 0 then asks SLURM to requeue the job. A
collective inside a signal handler, as in Lightning's own requeue, hangs when one rank is elsewhere.
"""

from __future__ import annotations

import enum
import signal
import time
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ic.callbacks.options import SlurmRequeueOptions
from ic.files.run_folder import RunFolder
from ic.machine.slurm_job import SlurmError, SlurmJob
from ic.parallel.agreement import Agreement

# EX_TEMPFAIL of sysexits.h: stopped with a checkpoint, to be continued by hand.
TO_BE_CONTINUED_EXIT_CODE = 75
# What a shell reports for a program that SIGTERM ended.
TERMINATED_EXIT_CODE = 143


class Stop(enum.IntEnum):
    """Why a rank wants to stop; the largest of all ranks counts."""

    NO = 0
    REQUEUE = 1
    TERMINATE = 2


class SlurmRequeue(Callback):
    """SIGUSR1, or the time limit coming near: save and requeue. SIGTERM: save and stop.

    Works without SLURM too: the run then saves and stops. `stop` tells afterwards, and `finish`,
    called once loggers are closed, requeues.

    Args:
        job: the SLURM job, if any.
    """

    def __init__(self, config: SlurmRequeueOptions, job: SlurmJob | None = None) -> None:
        self.config = config
        self.job = job
        self.stop = Stop.NO
        self._wanted = Stop.NO
        self._previous: dict[int, Any] = {}
        self._agreement = Agreement(1)
        self._end_time: float | None = None
        self._last_time = 0.0
        self._longest_step_s = 0.0

    @property
    def interrupted(self) -> bool:
        """Whether the run stopped before its end."""
        return self.stop is not Stop.NO

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a job that keeps falling over.

        Raises:
            ValueError: more restarts than allowed.
        """
        if self.job is not None and self.job.restart_count > self.config.max_restarts:
            raise ValueError(
                f"job {self.job.job_id} has been restarted {self.job.restart_count} times, more "
                f"than callbacks.requeue.max_restarts={self.config.max_restarts}; its last "
                "checkpoint is kept. Find what ends it, then submit again with the same run_id="
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        self._agreement = Agreement(trainer.world_size)
        self._end_time = self._read_end_time() if trainer.is_global_zero else None
        self._last_time = time.monotonic()

    def on_step_end(self, trainer: Trainer) -> None:
        if self.interrupted:
            return
        now = time.monotonic()
        self._longest_step_s = max(self._longest_step_s, now - self._last_time)
        self._last_time = now
        self.agree(trainer)
        if self.interrupted:
            trainer.limit_val_batches = 0  # a validation could outlast the time that is left
            trainer.should_stop = True  # `FolderCheckpoint` saves after the last step

    @property
    def asked(self) -> bool:
        """Whether a signal has come, or the time is up as far as this rank knows."""
        return self._wanted is not Stop.NO or self._time_is_up()

    def agree(self, trainer: Trainer) -> None:
        if self._wanted is Stop.NO and self._time_is_up():
            self._wanted = Stop.REQUEUE
        self.stop = Stop(self._agreement.largest(self._wanted))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not earlier: the evaluation after the training heeds signals as well.
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def finish(self, trainer: Trainer) -> int:
        """Requeue if that is what the ranks agreed on -> exit code of this process.

        Rank 0 speaks for all: a failure of another rank would have `srun --kill-on-bad-exit` end
        rank 0 while it still closes its loggers.

        Raises:
            SlurmError: SLURM refuses to requeue; the checkpoint is saved all the same.
        """
        if not trainer.is_global_zero:
            return 0
        resume = RunFolder(trainer.default_root_dir).resume_command
        if self.stop is Stop.TERMINATE:
            rank_zero_info(f"terminated; the checkpoint is saved, continue with {resume}")
            return TERMINATED_EXIT_CODE
        if self.job is None:
            rank_zero_info(f"stopped by a signal; continue with {resume}")
            return TO_BE_CONTINUED_EXIT_CODE
        if self.job.restart_count >= self.config.max_restarts:
            rank_zero_warn(
                f"job {self.job.job_id} is not requeued: {self.job.restart_count} restarts reach "
                f"callbacks.requeue.max_restarts={self.config.max_restarts}. The checkpoint is "
                "saved; submit again with the same run_id= and ckpt_path=auto to continue"
            )
            return TO_BE_CONTINUED_EXIT_CODE
        rank_zero_info(f"requeueing job {self.job.job_id}")
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM's answer to the request
        try:
            self.job.requeue()
        except SlurmError as error:
            signal.signal(signal.SIGTERM, previous)
            raise SlurmError(
                f"{error}. The checkpoint is saved; submit again with the same run_id= and "
                "ckpt_path=auto to continue"
            ) from error
        return 0

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        wanted = Stop.TERMINATE if signum == signal.SIGTERM else Stop.REQUEUE
        self._wanted = max(self._wanted, wanted)

    def _time_is_up(self) -> bool:
        if self._end_time is None or self._seconds_left() > 0:
            return False
        self._end_time = self._read_end_time()  # an administrator may have extended it
        return self._end_time is not None and self._seconds_left() <= 0

    def _seconds_left(self) -> float:
        assert self._end_time is not None
        return self._end_time - self.config.margin_s - self._longest_step_s - time.time()

    def _read_end_time(self) -> float | None:
        if self.job is None:
            return None
        try:
            return self.job.end_time()
        except SlurmError as error:
            rank_zero_warn(
                f"the time limit is not known, only a signal will requeue this job: {error}"
            )
            return None

    def _restore_handlers(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            if signal.getsignal(number) == self._on_signal:  # Lightning may have been first
                signal.signal(number, handler or signal.SIG_DFL)
