"""Runs functions on several gloo processes of this machine."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def spawn() -> Callable[..., None]:
    """`spawn(function, n, *args)` runs `function(rank, n, port, *args)` in n processes."""
    # The server imports once what every process needs; forking from it takes no time. A process
    # forked after CUDA was looked for could not use it.
    start_method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.set_forkserver_preload(["tests.parallel.training_run"])

    def run(function: Callable[..., Any], num_processes: int, *args: Any) -> None:
        torch.multiprocessing.start_processes(
            function, (num_processes, free_port(), *args), nprocs=num_processes,
            start_method=start_method,
        )  # fmt: skip

    return run
