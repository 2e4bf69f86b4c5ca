"""Which share of the data a process reads."""

from __future__ import annotations

from lightning import Trainer


def data_replica(trainer: Trainer | None) -> tuple[int, int]:
    """Data-parallel rank, and the number of such ranks; ranks that share a sequence share both.

    The strategy says it (`distributed_sampler_kwargs`); a single process is rank 0 of 1.
    """
    kwargs = None if trainer is None else trainer.distributed_sampler_kwargs
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)
