"""Data workers that die, stand still or find no room: one line, and what was trained is kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.utils.data import IterableDataset

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.datamodules import workers
from ic.datamodules.options import DataOptions, PasskeyDataOptions
from ic.datamodules.workers import (
    BATCHES_AHEAD,
    DataWorkerError,
    WorkerLoader,
    check_shared_memory,
    make_loader,
)
from ic.files.run_folder import RunFolder
from ic.tracking.csv_logger import read_metrics
from tests.conftest import SHORT

RUN = (*SHORT, "callbacks.passkey=null", "callbacks.memory=null", "callbacks.context_length=null")


class Counting(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (torch.tensor(i) for i in range(1000))


class Broken(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.tensor(0)
        raise KeyError("a bug")


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> WorkerLoader:
    monkeypatch.setattr(workers, "POLL_S", 0.2)
    options = DataOptions(num_workers=1, worker_timeout_s=1e9)  # a busy machine is slow
    return make_loader(WorkerLoader, Counting(), options, 1, None)


def hit(number: int) -> None:
    (worker,) = active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)


def drain(batches: Iterator[Any]) -> list[int]:
    """What comes until the loader gives up."""
    return [int(batch) for batch in batches]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"a data worker has ended \(.*\), perhaps for want of memory or of room"),
        (
            signal.SIGSTOP,
            r"no batch came from the data workers for 0\.5 s: one of them stands still",
        ),
    ],
)
def test_a_worker_that_fails_is_one_line(loader: WorkerLoader, number: int, message: str) -> None:
    """Without a hang, nor at the end of the process: no worker is left."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    assert int(next(batches)) == 0
    assert signal.getsignal(signal.SIGCHLD) == before  # nothing is raised amid a step
    hit(number)
    if number == signal.SIGSTOP:
        loader.patience_s = 0.5
    with pytest.raises(DataWorkerError, match=message) as caught:
        drain(batches)
    assert "\n" not in str(caught.value)
    del batches
    for child in active_children():
        child.join(60)
    assert active_children() == []


@pytest.mark.parametrize("asked_again", [True, False])
def test_a_lock_that_died_with_its_worker(
    loader: WorkerLoader, monkeypatch: pytest.MonkeyPatch, asked_again: bool
) -> None:
    """Workers look at one event between batches; one that is killed there keeps its lock."""
    events: list[Any] = []
    make = torch.multiprocessing.Event

    def make_and_keep() -> Any:
        events.append(make())
        return events[-1]

    monkeypatch.setattr(torch.multiprocessing, "Event", make_and_keep)
    batches = iter(loader)
    assert int(next(batches)) == 0
    (event,) = events
    (worker,) = active_children()
    holder = torch.multiprocessing.get_context("fork").Process(target=event._cond.acquire)
    holder.start()
    holder.join()
    assert not event._cond.acquire(False)
    worker.kill()
    worker.join()
    if asked_again:
        with pytest.raises(DataWorkerError, match="a data worker has ended"):
            drain(batches)
    del batches  # as a run does that ends by itself
    assert active_children() == []


def test_a_slow_batch_is_waited_for(loader: WorkerLoader) -> None:
    """A worker that stands still for several polls and goes on loses no batch."""
    batches = iter(loader)
    assert int(next(batches)) == 0
    hit(signal.SIGSTOP)
    threading.Timer(1.0, hit, (signal.SIGCONT,)).start()
    seen = [int(next(batches)) for _ in range(20)]
    assert seen == list(range(1, len(seen) + 1))


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    options = DataOptions(num_workers=1)
    with pytest.raises(KeyError, match="a bug"):
        drain(iter(make_loader(WorkerLoader, Broken(), options, 1, None)))


def test_the_room_that_is_needed(
    mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", mounted("size=1m"))
    fits = 2**20 // 32 // (BATCHES_AHEAD + 1) - 2**16 // 32 // (BATCHES_AHEAD + 1) - 1
    check_shared_memory(DataOptions(num_workers=1, tokens_per_batch=fits), 1)
    with pytest.raises(ValueError, match=r"may need 1\.\d\d MiB there, but 1\.00 MiB are free"):
        check_shared_memory(DataOptions(num_workers=1, tokens_per_batch=fits + 10), 1)
    with pytest.raises(ValueError, match="worker_timeout_s=0.0: must be above 0"):
        PasskeyDataOptions(worker_timeout_s=0.0)


def test_fit_refuses_before_the_first_step(
    ic: Callable[..., int],
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", mounted("size=64k"))
    assert ic(*RUN, "data.num_workers=1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ic: data.num_workers=1: the workers of this host hand over batches in")
    assert "set data.num_workers=0, or make it larger (docker run --shm-size=1g)" in error
    assert not (tmp_path / "runs/debug/default/csv/metrics.csv").exists()


def test_a_killed_worker_costs_no_step(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is noticed between two steps, and a checkpoint is saved there."""
    on_step_end = FolderCheckpoint.on_step_end

    def kill_at_2(self: FolderCheckpoint, trainer: Trainer) -> None:
        on_step_end(self, trainer)
        if trainer.global_step == 2:
            hit(signal.SIGKILL)

    monkeypatch.setattr(workers, "POLL_S", 0.2)
    monkeypatch.setattr(FolderCheckpoint, "on_step_end", kill_at_2)
    options = ("data.num_workers=1", "trainer.max_steps=50", "trainer.val_check_interval=100")
    assert ic(*RUN, *options, "callbacks.checkpoint.every_n_steps=100") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("ic: a data worker has ended (")
    assert "Traceback" not in error
    run = RunFolder(tmp_path / "runs/debug/default")
    (step,) = run.saved_steps()
    assert 2 <= step <= 2 + BATCHES_AHEAD + 1
    assert run.last.resolve() == run.checkpoint(step)
    assert f"the checkpoint of step {step} is saved; continue with fit run={run.path}\n" in error
    losses = [int(row["step"]) for row in read_metrics(run.metrics) if "train/loss" in row]
    assert losses == list(range(step))
