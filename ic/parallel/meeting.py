"""The first meeting of a run's processes, before PyTorch's own and much sooner given up.

PyTorch waits as long for a process that never starts as for one that takes long over a step. So
each process first leaves a word in a store at the address where the process group will meet, and
waits for the others' words.
"""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from torch.distributed.device_mesh import DeviceMesh

from ic.parallel.watchdog import MissingRanksError


@contextmanager
def all_met(environment: ClusterEnvironment | None, timeout_s: float) -> Iterator[None]:
    """Wait for every rank, then let the process group be made within.

    Args:
        environment: knows this process's rank already.
        timeout_s: how long this process waits; a process alone does not.

    Raises:
        MissingRanksError: naming the ranks that did not come; on those that cannot reach the
            store, which is rank 0's or its launcher's, that one.
    """
    if environment is None or environment.world_size() == 1 or dist.is_initialized():
        yield
        return
    rank, size = environment.global_rank(), environment.world_size()
    address, port = environment.main_address, environment.main_port
    wait = datetime.timedelta(seconds=timeout_s)
    # As PyTorch does it: torchrun has a store of its own there, otherwise rank 0 opens one, which
    # the process group then shares.
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    try:
        store = dist.TCPStore(
            address, port, size, opens, wait, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if opens:
            raise  # the port is taken, or no address of this host
        raise _missing([0], size, timeout_s, f" (at {address}:{port})") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    words = [f"ic/{attempt}/{each}" for each in range(size)]
    try:
        store.set(words[rank], "here")
        store.wait(words, wait)
    except dist.DistError as error:
        try:
            absent = [each for each, word in enumerate(words) if not store.check([word])]
        except dist.DistError:  # rank 0 gave up a moment earlier, and its store is gone
            absent = []
        raise _missing(absent or [0], size, timeout_s) from error
    yield
    del store  # kept until the process group has a hold of it
    atexit.register(part)


def part() -> None:
    """Leave the process group while Python still runs; `all_met` has this done at the very end.

    A thread of gloo's gives tensors back when the caller has long had their result. Where it does
    so while the interpreter ends, that ends the thread amid C++ and the process with it, by
    SIGABRT and exit code 134 (pytorch/pytorch#190489). A group that nothing holds has no threads.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a trainer and its reducers hold groups, and so do meshes ...
        for mesh in meshes():  # ... which DTensor's caches never let go
            getattr(mesh, "_pg_registry", {}).clear()


def meshes() -> list[DeviceMesh]:
    """Every mesh of this process.

    `isinstance` would ask each of Python's objects for its `__class__`, for which some of them
    warn, as PyTorch's `reduce_op` does.
    """
    return [each for each in gc.get_objects() if issubclass(type(each), DeviceMesh)]


def _missing(ranks: list[int], size: int, timeout_s: float, where: str = "") -> MissingRanksError:
    return MissingRanksError(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} of {size} did not "
        f"come to the first meeting within {timeout_s:g} s{where}: look at their logs and their "
        "nodes, or give slow ones longer (strategy.rendezvous_timeout_s)",
        ranks,
    )
