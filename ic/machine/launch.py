"""The processes of a verb: which one leads, how they start, and how a refusal ends them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from lightning import Trainer
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ic.machine.devices import check_accelerator
from ic.machine.slurm_job import SlurmJob
from ic.terminal import launched_rank


def leads_the_run() -> bool:
    """Whether this process is rank 0, as far as its environment tells before the ranks meet."""
    # Where a user starts one process on each node, only the number of the node differs.
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return launched_rank() == 0 and int(node) == 0


def launch_ranks(
    accelerator: str, devices: int, num_nodes: int, *, exchange_tensors: bool
) -> Fabric:
    """The processes of a verb that is no training run, all of them started.

    Args:
        exchange_tensors: they need a fast exchange of tensors on their devices, too.

    Raises:
        ValueError: more devices than there are.
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
        else FabricDDPStrategy(process_group_backend=backend, timeout=timedelta(days=1)),
        plugins=[] if job is None else [job.environment()],
    )
    fabric.launch()
    return fabric


@contextmanager
def refusing_for_all(trainer: Trainer) -> Iterator[None]:
    """A refusal ends the processes that Lightning started from this one: they would refuse too.

    torchrun and srun end theirs themselves.
    """
    try:
        yield
    except ValueError:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGTERM)
        raise
