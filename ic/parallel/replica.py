"""Which share of the data a process reads, and with whom it shares each sequence."""

from __future__ import annotations

from lightning import Trainer


def data_replica(trainer: Trainer | None) -> tuple[int, int]:
    """Data-parallel rank, and the number of such ranks; ranks that share a sequence share both.

    The strategy says it (`distributed_sampler_kwargs`); a single process is rank 0 of 1.
    """
    kwargs = None if trainer is None else trainer.distributed_sampler_kwargs
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)


def sharing_ranks(trainer: Trainer | None) -> tuple[int, int]:
    """This process's place among those that share its sequences, and their number.

    Ranks of a replica are neighbours (`ic.parallel.mesh`).
    """
    if trainer is None:
        return 0, 1
    size = trainer.world_size // data_replica(trainer)[1]
    return trainer.global_rank % size, size


def length_multiple(trainer: Trainer | None) -> int:
    """What a sequence's length has to be a multiple of: two chunks for each rank that shares it."""
    _, size = sharing_ranks(trainer)
    return 2 * size if size > 1 else 1
