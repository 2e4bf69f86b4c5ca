"""Shared fixtures: small models, runs of the command line inside the process, gloo processes."""

from __future__ import annotations

import faulthandler
import logging
import os

import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import multiprocessing
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import settings
from matplotlib.figure import Figure
from torch.distributed import TCPStore

from ic.cli import main
from ic.model import MLAConfig, MLAForCausalLM

# A shell gives what it runs in the background no Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread: sums are then the same on every machine of a kind, and two workers share two cores.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test has a deadline: how long an example takes is the machine's business.
settings.register_profile("ic", deadline=None)
settings.load_profile("ic")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What a rank of a sharded run would import while it runs, each rank for itself.
LATE_IMPORTS = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "peft",
    "ic.callbacks.evaluation",
    "ic.callbacks.requeue",
    "ic.datamodules.passkey",
    "ic.parallel.fsdp2",
    "ic.training.preference",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def make_model() -> Callable[..., MLAForCausalLM]:
    """A small model whose every weight, zero-initialised ones too, is random."""

    def make(**changes: object) -> MLAForCausalLM:
        torch.manual_seed(0)
        model = MLAForCausalLM(MLAConfig(**{**SMALL, **changes})).eval()
        randomize(model)
        return model

    return make


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights of a size at which logits have a standard deviation near one."""
    for name, parameter in model.named_parameters():
        if name.endswith("length_temperature.scale"):
            parameter.uniform_(0.1, 0.2)  # around 1 / ln(1024), where training starts
        elif parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.uniform_(0.5, 1.5)


@pytest.fixture
def ic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `python -m ic ...` in this process inside an empty folder -> exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):  # the command line sets both
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])

    def run(*args: str) -> int:
        with pytest.raises(SystemExit) as exit_:
            main(list(args))
        return int(exit_.value.code or 0)

    return run


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small tmpfs with the options given."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a tmpfs: {error}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved to a file, in order, to be asked what it shows."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def host_store() -> TCPStore:
    """The store where processes with TORCHELASTIC_USE_AGENT_STORE=True meet; keep it as long.

    It listens from here on: a free port that a process opens later could be taken by then.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def run_and_part(rank: int, function: Callable[..., Any], *args: Any) -> None:
    """Run `function(rank, *args)`, and leave its process group, if it made one, with the others.

    Processes that end one by one close connections that others still use, and threads of gloo's
    that still hold tensors when an interpreter ends abort it. Where one is aborted all the same, its
    stacks are shown.
    """
    faulthandler.enable()
    function(rank, *args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def spawn() -> Callable[..., None]:
    """`spawn(function, n, *args)` runs `function(rank, n, port, *args)` in n processes.

    They leave the process group together, once every function has returned.
    """
    # The server imports once what every process needs; forking from it takes no time. A process
    # forked after CUDA was looked for could not use it.
    start_method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.set_forkserver_preload(["tests.parallel.training_run", *LATE_IMPORTS])

    def run(function: Callable[..., Any], num_processes: int, *args: Any) -> None:
        store = host_store()
        torch.multiprocessing.start_processes(
            run_and_part,
            (function, num_processes, store.port, *args),
            nprocs=num_processes,
            start_method=start_method,
        )

    return run


# A run of a few short steps that touches every part; options come last and win.
SHORT = (
    "fit",
    "experiment=mla_tiny",
    "debug=default",
    "data.context_length=256",
    "data.tokens_per_batch=512",
    "data.val_batches=1",
    "report=false",  # it draws for half a second; tests/run/test_report.py asks for it
)
