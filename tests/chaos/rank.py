"""One process of a run that counts what it does, and is sent a signal at an event chosen before.

An event is a file operation in the run's folder, as Python's audit hooks tell it, or a hook of
Lightning's callbacks. Both are counted by the phase in which they come. A kill is therefore placed
by what the process does, and a slow machine does not move it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ic.cli import main
from ic.files.run_folder import RunFolder
from tests.parallel.training_run import join

# What reads or changes files; the first argument is a path, a rename's second too.
FILE_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.link",
}
HOOKS = (
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_train_end",
    "on_exception",
    "on_fit_end",
    "teardown",
)
# The phase that a hook begins; others leave it as it is.
BEGINS = {
    "on_train_start": "training",
    "on_validation_start": "validation",
    "on_validation_end": "training",
    "on_train_end": "evaluation",
    "on_fit_end": "end",
}


@dataclass(frozen=True)
class Kill:
    """A signal that a rank sends itself.

    Attributes:
        phase: in which it comes: start, training, validation, checkpoint, evaluation or end.
        event: which event of that phase, from 0, counted in this process.
        number: of the signal.
        rank: the process that it is sent to.
        delay_s: seconds after the event; it then comes in the middle of what no event shows, such
            as the writing of tensors.
        together: the other ranks are killed with it, as a launcher does and when a machine goes;
            or they are left to notice.
    """

    phase: str
    event: int
    number: int = signal.SIGKILL
    rank: int = 0
    delay_s: float = 0.0
    together: bool = True


class Tracer:
    """Counts events, writes them to a file and sends the signal."""

    def __init__(self, run: RunFolder, trace: Path, kill: Kill | None) -> None:
        self.run, self.kill = run, kill
        self.folder, self.checkpoints = str(run.path), str(run.checkpoints)
        self.file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.phase = "start"
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()  # sharded checkpoints are written by a thread

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS:
            return
        path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else ""
        if path.startswith(self.folder):
            in_checkpoint = path.startswith(self.checkpoints) and self.phase != "start"
            name = path.removeprefix(self.folder)
            self.count("checkpoint" if in_checkpoint else self.phase, f"{event} {name}")
        elif event in ("os.remove", "os.rmdir") and args[-1] != -1:  # within shutil.rmtree
            self.count("checkpoint", f"{event} {path}")

    def count(self, phase: str, what: str) -> None:
        with self.lock:
            index = self.seen[phase]
            self.seen[phase] += 1
            os.write(self.file, f"{phase}\t{index}\t{what}\n".encode())
        kill = self.kill
        if kill is None or (kill.phase, kill.event) != (phase, index):
            return
        self.kill = None
        os.write(self.file, f"kill\t{kill.number}\n".encode())
        if kill.delay_s:
            threading.Timer(kill.delay_s, os.kill, (os.getpid(), kill.number)).start()
        else:
            os.kill(os.getpid(), kill.number)


class Ticks(Callback):
    """Shows the tracer what training does."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer


def _ticking(hook: str) -> Any:
    def tick(self: Ticks, *args: Any, **kwargs: Any) -> None:
        self.tracer.phase = BEGINS.get(hook, self.tracer.phase)
        phase = "checkpoint" if hook == "on_save_checkpoint" else self.tracer.phase
        self.tracer.count(phase, hook)

    return tick


for _hook in HOOKS:
    setattr(Ticks, _hook, _ticking(_hook))


def run_rank(
    rank: int,
    num_ranks: int,
    port: int,
    args: tuple[str, ...],
    run: Path,
    trace: Path,
    kill: Kill | None,
) -> None:
    """`python -m ic ARGS` as a rank of `num_ranks`; what it prints and does goes beside `trace`."""
    output = os.open(trace.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(trace.parent)
    os.environ["IC_COMMIT"] = "chaos"  # not the checkout's, which may be edited meanwhile
    sys.argv = ["ic", *args]
    join(rank, num_ranks, port)
    rank_zero_only.rank = rank  # Lightning reads the environment when it is imported
    tracer = Tracer(RunFolder(run), trace, kill if kill and kill.rank == rank else None)
    make_trainer = Trainer.__init__

    def make_ticking_trainer(self: Trainer, **kwargs: Any) -> None:
        make_trainer(self, **{**kwargs, "callbacks": [Ticks(tracer), *kwargs["callbacks"]]})

    Trainer.__init__ = make_ticking_trainer  # type: ignore[method-assign]
    sys.addaudithook(tracer.audit)
    main(list(args))
