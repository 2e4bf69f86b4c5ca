"""A rank that does not arrive is named: barriers over gloo, and NCCL's flight recorder."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ic.errors import RunFailedError
from ic.parallel.options import WatchdogOptions

# Of gloo, which raises plain RuntimeErrors.
_OF_A_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "[Gloo]", "gloo/")


class MissingRanksError(RunFailedError):
    """Some ranks did not reach a barrier in time; `ranks` holds them."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class Watchdog(Callback):
    """Barriers over all ranks at the start of training and at each checkpoint.

    Raises:
        MissingRanksError: on rank 0, with the ranks that did not come.
    """

    def __init__(self, config: WatchdogOptions | None = None) -> None:
        self.config = config or WatchdogOptions()
        self._group: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            timeout = datetime.timedelta(seconds=self.config.timeout_s)
            # Gloo can time out and go on; an NCCL time-out ends the process.
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            await_ranks(self._group, "the start of training", self.config.timeout_s)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._group is not None:
            what = f"the checkpoint of step {trainer.global_step}"
            await_ranks(self._group, what, self.config.timeout_s)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        failed = isinstance(exception, dist.DistError) or "imed out" in str(exception)
        if self._group is None or not failed or isinstance(exception, MissingRanksError):
            return
        what = "the check after a failed collective"
        try:
            await_ranks(self._group, what, self.config.after_error_s)
        except MissingRanksError as error:
            rank_zero_warn(str(error))


def await_ranks(group: Any, what: str, timeout_s: float) -> None:
    """Barrier over a gloo group.

    Raises:
        MissingRanksError: on rank 0, naming the ranks that did not arrive; on the others, that
            rank 0 did not answer.
    """
    try:
        dist.monitored_barrier(
            group, timeout=datetime.timedelta(seconds=timeout_s), wait_all_ranks=True
        )
    except RuntimeError as error:
        named = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", str(error))
        ranks = [int(rank) for rank in re.findall(r"\d+", named.group(1))] if named else [0]
        raise MissingRanksError(
            f"ranks {', '.join(map(str, ranks))} of {dist.get_world_size(group)} did not reach "
            f"{what} within {timeout_s:g} s: look at their logs and their nodes",
            ranks,
        ) from error


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn what PyTorch says of a rank that ended, or never came, into one line.

    Raises:
        MissingRanksError: no time-out waits for ever, but none tells a user what to look at.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, RunFailedError) or not (
            isinstance(error, dist.DistError) or any(sign in text for sign in _OF_A_LOST_RANK)
        ):
            raise
        rank, ranks = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        if dist.is_initialized():
            rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        first = text.splitlines()[0] if text else type(error).__name__
        raise MissingRanksError(
            f"rank {rank} of {ranks} lost the others: {first[:200]}. One of them has ended or "
            "never started: look at the first error in the logs of all ranks",
            [],
        ) from error


def record_collectives(folder: Path) -> None:
    """Let NCCL keep its last collectives and write them to `folder` when one times out.

    Takes effect for process groups made afterwards; what the user has set stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_")),
    ):
        os.environ.setdefault(name, value)
