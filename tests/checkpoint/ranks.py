"""`python -m ic fit` on several gloo processes of this machine, watched and disturbed from inside."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as dcp_files
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from ic.checkpoint.rng import rng_state
from ic.cli import main
from ic.config.callbacks import CallbacksConfig
from tests.conftest import LATE_IMPORTS, host_store


class Probe(Callback):
    """Leaves what a run holds in memory: at its first batch, and whenever it saves.

    Draws random numbers, differently on each rank, so that the ranks' random states differ.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.rand(trainer.global_rank + 1)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.started:
            self.started = True
            self._write(trainer, "start")

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        # By now the checkpoint callback, which comes last, has restored the random states.
        if not (self.folder / f"start.rng{trainer.global_rank}.pt").exists():
            self._write_rng(trainer, "start")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write(trainer, f"step={trainer.global_step}")
        self._write_rng(trainer, f"step={trainer.global_step}")

    def _write(self, trainer: Trainer, name: str) -> None:
        (optimizer,) = trainer.optimizers
        names = {parameter: name for name, parameter in trainer.lightning_module.named_parameters()}
        tensors = {name: whole(parameter) for parameter, name in names.items()} | {
            f"{names[parameter]}.{key}": whole(value)
            for parameter, entry in optimizer.state.items()
            for key, value in entry.items()
        }
        if trainer.is_global_zero:
            torch.save(tensors, self.folder / f"{name}.pt")

    def _write_rng(self, trainer: Trainer, name: str) -> None:
        state = {**rng_state(), "torch": torch.get_rng_state().tolist()}
        torch.save(state, self.folder / f"{name}.rng{trainer.global_rank}.pt")


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def killed_while_writing() -> None:
    """SIGKILL in the middle of the second checkpoint's shard."""
    create_stream = dcp_files.FileSystem.create_stream

    def until_killed(self: Any, path: Path, mode: str) -> Any:
        if mode == "wb" and "step=4" in str(path):
            path.write_bytes(b"half a sh")
            os.kill(os.getpid(), signal.SIGKILL)
        return create_stream(self, path, mode)

    dcp_files.FileSystem.create_stream = until_killed  # type: ignore[method-assign]


def killed_before_renaming() -> None:
    """SIGKILL when every rank has written and the folder would get its name."""
    _kill_at("rename", "step=4")


def killed_before_linking() -> None:
    """SIGKILL when the folder has its name and `last` would move."""
    rename, renamed = Path.rename, False

    def watched(self: Path, target: Any) -> Path:
        nonlocal renamed
        renamed = renamed or Path(target).name == "step=4"
        return rename(self, target)

    Path.rename = watched  # type: ignore[method-assign, assignment]
    _kill_at("replace", "last", lambda: renamed)


def _kill_at(method: str, name: str, when: Callable[[], bool] = lambda: True) -> None:
    original = getattr(Path, method)

    def fatal(self: Path, target: Any) -> Path:
        if Path(target).name == name and when():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)

    setattr(Path, method, fatal)


def small_files() -> None:
    """No file can grow past 200 kB: less than a shard."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def run_ranks(
    folder: Path,
    num_processes: int,
    *args: str,
    fault: Callable[[], None] | None = None,
    faulty_rank: int = 0,
) -> tuple[list[int | None], str]:
    """Run `fit` with `args` in `folder`; exit codes, and all that the ranks printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LATE_IMPORTS])
    store = host_store()
    faults = [fault if rank == faulty_rank else None for rank in range(num_processes)]
    processes = [
        context.Process(
            target=_rank, args=(rank, num_processes, store.port, folder, args, faults[rank])
        )
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    logs = "".join((folder / f"rank{rank}.log").read_text() for rank in range(num_processes))
    return [process.exitcode for process in processes], logs


def _rank(
    rank: int,
    num_processes: int,
    port: int,
    folder: Path,
    args: tuple[str, ...],
    fault: Callable[[], None] | None,
) -> None:
    os.chdir(folder)
    log = os.open(f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if num_processes > 1:
        os.environ.update(
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    build = CallbacksConfig.build
    CallbacksConfig.build = lambda callbacks, run: [  # type: ignore[method-assign]
        *build(callbacks, run),
        Probe(folder / f"{run.run_id}.probe"),
    ]
    if fault is not None:
        fault()
    main(["fit", f"trainer.devices={num_processes}", *args])
    sys.exit(0)
