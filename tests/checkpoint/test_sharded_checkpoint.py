"""Sharded checkpoints: any world size loads them, and no crash or full disk costs one."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.sharded_checkpoint import _Pending
from ic.parallel.fsdp2 import FSDP2Strategy
from tests.checkpoint.conftest import FIT
from tests.checkpoint.ranks import (
    killed_before_linking,
    killed_before_renaming,
    killed_while_writing,
    run_ranks,
    small_files,
)

TWO = (*FIT, "callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=4")


def checkpoints(folder: Path, run: str) -> Path:
    return folder / "runs/debug" / run / "checkpoints"


def names(folder: Path, run: str) -> dict[str, str | None]:
    found = checkpoints(folder, run).iterdir()
    return {p.name: os.readlink(p) if p.is_symlink() else None for p in found}


def losses(folder: Path, run: str) -> dict[int, float]:
    rows = csv.DictReader((folder / "runs/debug" / run / "csv/metrics.csv").open())
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


def probed(folder: Path, run: str, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{run}.probe" / f"{name}.pt", weights_only=True)


def test_keeps_the_last_and_every_nth(four: Path) -> None:
    kept = {"step=2": None, "step=4": None, "step=5": None, "last": "step=5"}
    assert names(four, "four") == kept
    files = {p.name for p in (checkpoints(four, "four") / "last").iterdir()}
    assert files >= {"config.json", "tokenizer_config.json", "trainer.pt", ".metadata"}
    assert {f"__{rank}_0.distcp" for rank in range(4)} <= files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "strategy"),
    [(4, "fsdp2"), (2, "fsdp2"), (1, "fsdp2"), (1, "auto")],
    ids=lambda value: str(value),
)
def test_any_world_size_resumes(
    four: Path, num_processes: int, strategy: str, tmp_path: Path
) -> None:
    run = f"{strategy}{num_processes}"
    context = [f"strategy.context_parallel_size={num_processes}"] if strategy == "fsdp2" else []
    codes, output = run_ranks(
        tmp_path,
        num_processes,
        *FIT,
        f"strategy={strategy}",
        *context,
        f"run_id={run}",
        f"ckpt_path={checkpoints(four, 'four') / 'step=2'}",
    )
    assert codes == [0] * num_processes, output
    saved, loaded = probed(four, "four", "step=2"), probed(tmp_path, run, "start")
    assert any(name.endswith("momentum_buffer") for name in saved)
    assert any(name.endswith("exp_avg") for name in saved)
    assert loaded.keys() == saved.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in saved.items())
    after = {step: loss for step, loss in losses(four, "four").items() if step >= 2}
    same_world = num_processes == 4
    resumed = losses(tmp_path, run)
    if same_world:
        assert resumed == after
    else:  # the ranks' sums have another order, which later steps amplify
        assert resumed[2] == pytest.approx(after[2], rel=1e-6)
        assert resumed == pytest.approx(after, rel=2e-5)
    assert ("seeded anew with 2" in output) != same_world
    if same_world:
        states = [probed(tmp_path, run, f"start.rng{rank}") for rank in range(4)]
        assert states == [probed(four, "four", f"step=2.rng{rank}") for rank in range(4)]


@pytest.mark.slow
def test_one_process_continues_on_two(four: Path, tmp_path: Path) -> None:
    alone = (*TWO, "strategy=auto", "run_id=alone", "trainer.max_steps=2")
    codes, output = run_ranks(tmp_path, 1, *alone)
    assert codes == [0], output
    codes, output = run_ranks(
        tmp_path, 2, *TWO, "run_id=two", f"ckpt_path={checkpoints(tmp_path, 'alone') / 'step=2'}"
    )
    assert codes == [0, 0], output
    saved, loaded = probed(tmp_path, "alone", "step=2"), probed(tmp_path, "two", "start")
    assert loaded.keys() == saved.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in saved.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "left"),
    [
        (killed_while_writing, 1, {"step=2"}),
        (killed_before_renaming, 0, {"step=2"}),
        (killed_before_linking, 0, {"step=2", "step=4"}),
    ],
)
def test_killed_while_saving(
    fault: Callable[[], None], rank: int, left: set[str], tmp_path: Path
) -> None:
    codes, output = run_ranks(tmp_path, 2, *TWO, "run_id=broken", fault=fault, faulty_rank=rank)
    assert codes[rank] == -9, output
    assert codes[1 - rank] not in (0, None), output
    found = names(tmp_path, "broken")
    assert found["last"] == "step=2"
    partial = {name for name in found if ".partial-" in name}
    assert set(found) - partial == left | {"last"}
    assert bool(partial) == (rank == 0)  # a living rank 0 has removed it
    codes, output = run_ranks(tmp_path, 2, *TWO, "run_id=broken", "ckpt_path=last")
    assert codes == [0, 0], output
    assert "Restored all states" in output
    assert names(tmp_path, "broken") == {"step=4": None, "last": "step=4"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """A run's folder with its checkpoints on a tmpfs; without root, a limit on file sizes too."""
    folder = checkpoints(tmp_path, "full")
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    yield tmp_path, None if mounted else small_files
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk(small_disk: tuple[Path, Callable[[], None] | None]) -> None:
    folder, limit = small_disk
    run = (*TWO, "run_id=full", "callbacks.checkpoint.keep_last=2")
    codes, output = run_ranks(folder, 2, *run, "trainer.max_steps=2")
    assert codes == [0, 0], output
    if limit is None:
        disk = checkpoints(folder, "full")
        size = shutil.disk_usage(disk).used + 200_000
        subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    longer = (*run, "ckpt_path=last", "allow_config_change=true")
    codes, output = run_ranks(folder, 2, *longer, fault=limit, faulty_rank=1)
    assert codes == [2, 2], output
    assert f"could not save the checkpoint {checkpoints(folder, 'full') / 'step=4'}" in output
    assert "No space left on device" in output or "File too large" in output
    assert names(folder, "full") == {"step=2": None, "last": "step=2"}


@pytest.mark.slow
def test_refused_on_every_rank(four: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(four, "four") / "step=2", tmp_path / "step=2")
    resume = (*TWO, f"ckpt_path={folder}")
    cases = {
        ("model.hidden_size=96", "model.kv_lora_rank=48"): (
            "of another architecture: hidden_size 128 (configured 96), "
            "kv_lora_rank 64 (configured 48)"
        ),
        ("optimizer=adamw",): "holds no optimizer state 'step' of model.layers.0",
    }
    for changes, message in cases.items():
        codes, output = run_ranks(tmp_path, 2, *resume, *changes)
        assert codes == [2, 2], output
        assert output.count(message) == 2, output
    shard = folder / "__2_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    codes, output = run_ranks(tmp_path, 2, *resume)
    assert codes == [2, 2], output
    assert output.count(f"{shard} is truncated or damaged: it differs from") == 2, output


class Writing(Future[None]):
    def exception(self, timeout: float | None = None) -> BaseException | None:
        assert self.done(), "the rank waits for its writing thread"
        return super().exception(timeout)


class Saving(FSDP2Strategy):
    """One rank, in a save that ends when the test says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.writing = Writing()
        self._pending = _Pending(self.writing, folder / "step=2.partial", folder / "step=2")
        self._pending.partial.mkdir()

    @property
    def is_global_zero(self) -> bool:
        return True


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_training_does_not_wait_for_a_save_and_learns_when_it_is_done(tmp_path: Path) -> None:
    strategy = Saving(tmp_path)
    assert strategy.settle(wait_for_it=False) is False
    assert strategy.settle(wait_for_it=False) is False  # still
    strategy.writing.set_result(None)
    assert strategy.settle(wait_for_it=False) is True
    assert strategy._pending is None
    assert strategy.settle(wait_for_it=True) is True


@pytest.mark.usefixtures("one_rank")
def test_a_save_that_failed_is_said_once_and_leaves_nothing(tmp_path: Path) -> None:
    strategy = Saving(tmp_path)
    strategy.writing.set_exception(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match=f"{tmp_path}/step=2.*No space left on device"):
        strategy.settle(wait_for_it=False)
    assert list(tmp_path.iterdir()) == []
    assert strategy.settle(wait_for_it=True) is True
