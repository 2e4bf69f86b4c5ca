"""A CUDA memory snapshot at the moment an allocation fails, while the tensors that filled the GPU
are still alive.

By the time an exception handler runs, the stack has unwound and the activations are gone. PyTorch
calls an observer before it raises (`torch._C._cuda_attach_out_of_memory_observer`: private, but the
only hook there is). An observer cannot be detached, so a process attaches one and its target can
change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ic.display.numbers import gib
from ic.files.atomic_write import replacing

log = logging.getLogger(__name__)

VIEWER = "https://docs.pytorch.org/memory_viz"


class _Observer:
    """The process's one observer; does nothing while no run is on."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.attached = False

    def __call__(self, device: int, requested: int, device_total: int, device_free: int) -> None:
        if self.path is not None:
            asked, free, total = (gib(n, 2) for n in (requested, device_free, device_total))
            what = f"GPU {device}: {asked} requested, {free} of {total} free"
            write_oom_snapshot(self.path, what)


_observer = _Observer()


def watch_out_of_memory(path: Path, history_entries: int) -> bool:
    """From now on write a snapshot to `path` when CUDA runs out of memory; False where PyTorch
    lacks the hook.

    Args:
        path: the snapshot's file. A later out-of-memory replaces it.
        history_entries: the last allocations and frees to keep with their Python stacks (a ring
            buffer, about a microsecond an allocation and some kB an entry in the file); 0 keeps no
            history, and the snapshot shows blocks without saying who allocated them.
    """
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        return False
    if not _observer.attached:
        attach(_observer)
        _observer.attached = True
    if history_entries:
        torch.cuda.memory._record_memory_history(max_entries=history_entries, stacks="python")
    _observer.path = path
    return True


def stop_watching() -> None:
    """Undo `watch_out_of_memory`: no file, no history recorded."""
    if _observer.path is not None:
        _observer.path = None
        torch.cuda.memory._record_memory_history(enabled=None)


def write_oom_snapshot(path: Path, what: str, dump: Callable[[str], None] | None = None) -> bool:
    """Write the snapshot and say where it is. Returns False, and says why, when it could not be
    written. `dump` writes it to a path; by default PyTorch does.

    Never raises: an exception from the observer would replace the out-of-memory error that the user
    has to see.
    """
    try:
        with replacing(path) as temporary:
            (dump or torch.cuda.memory._dump_snapshot)(str(temporary))
    except Exception as error:
        log.error("CUDA out of memory (%s); no snapshot: %s: %s", what, type(error).__name__, error)
        return False
    log.error("CUDA out of memory (%s). Snapshot: %s, open it at %s", what, path.resolve(), VIEWER)
    return True
