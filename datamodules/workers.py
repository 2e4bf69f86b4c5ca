"""Loaders whose worker processes cannot hang a run: a worker that fails is one line at a boundary.

PyTorch raises for a dead worker wherever the training happens to be, amid an optimizer's update
too, and waits for a stopped one for ever. Here both are noticed where the next batch is asked for,
between two steps, so that a checkpoint can be saved.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing import Event
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from ic.datamodules.options import DataOptions
from ic.errors import RunFailedError

SHARED_MEMORY = Path("/dev/shm")
BATCHES_AHEAD = 4  # of each worker
POLL_S = 5.0
# Of a batch: three int64 and at most two smaller tensors for each token.
_BYTES_PER_TOKEN = 32
# Of a worker: the semaphores and pipes of its queues, whatever it sends.
_BYTES_PER_WORKER = 2**16
_SIGNS = ("DataLoader worker (pid", "DataLoader timed out", "shared memory", "No space left")

Loader = TypeVar("Loader", bound="WorkerLoader")


class DataWorkerError(RunFailedError):
    """A process that makes batches has ended, or gives no answer."""


class WorkerLoader(DataLoader):
    """Made by `make_loader`.

    Attributes:
        patience_s: how long to wait for a batch.
    """

    patience_s = 600.0

    def __iter__(self) -> Any:
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            yield from super().__iter__()
            return
        iterator: Any = _without_interruptions(super().__iter__)
        workers = iterator._workers
        failed = None
        try:
            while failed is None:
                try:
                    batch = _next_in_time(iterator, workers, self.patience_s)
                except StopIteration:
                    return
                except (RuntimeError, ConnectionError, EOFError) as error:
                    text = " ".join(str(error).split())
                    if isinstance(error, RuntimeError) and not any(sign in text for sign in _SIGNS):
                        raise
                    failed = text
                else:
                    yield batch
        finally:
            if failed is not None or _killed(workers):
                _end_workers(iterator)
            del iterator
        raise DataWorkerError(_explain(failed, self.patience_s))


def _killed(workers: Collection[BaseProcess]) -> list[BaseProcess]:
    """Those that ended with another code than 0, as one that is killed does."""
    return [worker for worker in workers if worker.exitcode not in (None, 0)]


def _end_workers(iterator: Any) -> None:
    """End all workers where one was killed or stands still, which heeds nothing else.

    One that was killed may have held the lock of the event that tells them all to end. PyTorch
    would wait for that lock for ever (pytorch/pytorch#39570).
    """
    for worker in iterator._workers:
        worker.kill()
    ends = time.monotonic() + POLL_S
    for worker in iterator._workers:
        worker.join(max(0.0, ends - time.monotonic()))
    iterator._workers_done_event = Event()  # nobody is left to look at the old one


def _next_in_time(iterator: Iterator[Any], workers: Collection[BaseProcess], limit_s: float) -> Any:
    """The next batch, with an eye on the workers: reading what one of them has half sent, or asking
    one that stands still for a batch's memory, has no time-out of its own.
    """
    every_s, waited_s = min(POLL_S, limit_s), 0.0

    def look(signum: int, frame: FrameType | None) -> None:
        nonlocal waited_s
        waited_s += every_s
        if killed := _killed(workers):
            raise RuntimeError(f"DataLoader worker (pid {killed[0].pid}) exited unexpectedly")
        if waited_s >= limit_s:
            raise RuntimeError("DataLoader timed out")
        signal.setitimer(signal.ITIMER_REAL, every_s)  # once each time: it must not raise twice

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, every_s)
    try:
        return next(iterator)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_loader(
    kind: type[Loader], dataset: Any, config: DataOptions, num_workers: int, trainer: Trainer | None
) -> Loader:
    """A loader of whole batches.

    Raises:
        ValueError: /dev/shm, where workers hand over batches, has no room for them.
    """
    if num_workers:
        # Threads of this process's tokenizer do not live on in its workers, each of which would say
        # so or, where the environment says "true", wait for them for ever. There are enough workers
        # to do without.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        ranks = 1 if trainer is None else trainer.num_devices
        check_shared_memory(config, num_workers * ranks)
    loader = kind(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
    )
    loader.patience_s = config.worker_timeout_s
    return loader


def check_shared_memory(config: DataOptions, num_workers: int) -> None:
    """Compare what the workers of this host may need with what is free.

    Raises:
        ValueError: there is too little.
    """
    if not SHARED_MEMORY.is_dir():
        return
    batches = num_workers * (BATCHES_AHEAD + 1)
    needed = batches * config.tokens_per_batch * _BYTES_PER_TOKEN + num_workers * _BYTES_PER_WORKER
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ValueError(
            f"data.num_workers={config.num_workers}: the workers of this host hand over batches in "
            f"{SHARED_MEMORY} and may need {_mib(needed)} there, but {_mib(free)} are free; set "
            "data.num_workers=0, or make it larger (docker run --shm-size=1g)"
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.2f} MiB"


def _without_interruptions(begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Start the workers; leave out the handler that raises for a dead one at any moment."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return begin()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _explain(text: str, patience_s: float) -> str:
    if "timed out" in text:
        return (
            f"no batch came from the data workers for {patience_s:g} s: one of them stands still. "
            "Look at the file system of data.*_files, raise data.worker_timeout_s, or set "
            "data.num_workers=0"
        )
    return (
        f"a data worker has ended ({text[:200]}), perhaps for want of memory or of room in "
        f"{SHARED_MEMORY}: lower data.num_workers, or set it to 0"
    )
