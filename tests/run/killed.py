"""`python -m ic` in a process of its own that is killed at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ic.cli import main
from tests.conftest import LATE_IMPORTS


def kill_in(owner: type, method: str, when: Callable[[Any], bool] = lambda _: True) -> None:
    """Have this process killed, as by `kill -9`, when `owner.method` is called and `when(self)`."""
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def run_and_die(
    folder: Path,
    args: tuple[str, ...],
    arm: Callable[..., None],
    *given: Any,
    exit_code: int = -signal.SIGKILL,
) -> None:
    """Run the command line in `folder`; `arm(*given)` says there where it is to be killed.

    Raises:
        AssertionError: it ended in another way.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LATE_IMPORTS])
    process = context.Process(target=_run, args=(folder, args, arm, given))
    process.start()
    process.join()
    assert process.exitcode == exit_code, process.exitcode


def _run(folder: Path, args: tuple[str, ...], arm: Callable[..., None], given: Any) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    arm(*given)
    main(list(args))
