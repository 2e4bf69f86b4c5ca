"""The processes of a verb: which one leads, how they start, and how a refusal ends them."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from subprocess import Popen, TimeoutExpired

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import Strategy as FabricStrategy
from lightning.fabric.strategies.launchers import (
    _SubprocessScriptLauncher as _FabricSubprocessScriptLauncher,
)
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ic.machine.devices import check_accelerator
from ic.machine.slurm_job import SlurmJob
from ic.parallel.ddp import MeetingFabricDDPStrategy
from ic.parallel.meeting import part
from ic.terminal import launched_rank

_END_WITHIN_S = 10.0


def leads_the_run() -> bool:
    """Whether this process is rank 0, as far as its environment tells before the ranks meet."""
    # Where a user starts one process on each node, only the number of the node differs.
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return launched_rank() == 0 and int(node) == 0


@contextmanager
def launched_ranks(
    accelerator: str,
    devices: int,
    num_nodes: int,
    *,
    exchange_tensors: bool,
    rendezvous_timeout_s: float,
) -> Iterator[Fabric]:
    """The processes of a verb that is no training run, all of them started; they end together.

    Args:
        rendezvous_timeout_s: how long they wait for each other at the start.
        exchange_tensors: they need a fast exchange of tensors on their devices, too.

    Raises:
        ValueError: more devices than there are.
        MissingRanksError: some of them did not come.
    """
    check_accelerator(accelerator)
    gpus, job = torch.cuda.device_count(), SlurmJob.current()
    if job is not None:
        devices, num_nodes = job.tasks_per_node, job.num_nodes
    on_gpu = gpus and accelerator != "cpu"
    if on_gpu and devices > gpus:
        raise ValueError(f"devices={devices}: this host has {gpus} GPUs")
    alone = devices * num_nodes == 1
    backend = "cpu:gloo,cuda:nccl" if exchange_tensors and on_gpu else "gloo"
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy="auto"
        if alone
        # Without an exchange they meet only before and after their work, which may take one of them
        # much longer than the others.
        else MeetingFabricDDPStrategy(backend, rendezvous_timeout_s, timedelta(days=1)),
        plugins=[] if job is None else [job.environment()],
    )
    with ending_together(fabric.strategy):
        fabric.launch()
        yield fabric


@contextmanager
def ending_together(strategy: Strategy | FabricStrategy) -> Iterator[None]:
    """An error of this process ends those that Lightning started from it: they wait for it.

    torchrun and srun end theirs themselves. None of them parts from its group in order, which would
    wait for the exchanges that the others have not begun.
    """
    try:
        yield
    except BaseException as error:
        atexit.unregister(part)
        if not isinstance(error, Exception):
            raise
        launcher = strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher | _FabricSubprocessScriptLauncher):
            _end(launcher.procs)
        raise


def _end(processes: list[Popen[bytes]]) -> None:
    ended = list(processes)
    processes.clear()  # a thread of Lightning's watches this list and kills this process for one
    for process in ended:
        process.terminate()
    until = time.monotonic() + _END_WITHIN_S
    for process in ended:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except TimeoutExpired:  # it hangs in a collective, where Python handles no signal
            process.kill()
