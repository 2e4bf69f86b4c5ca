"""A monitored barrier that a rank does not reach names that rank."""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ic.parallel.options import WatchdogOptions
from ic.parallel.watchdog import (
    MissingRanksError,
    await_ranks,
    naming_lost_ranks,
    record_collectives,
)
from tests.parallel.training_run import join

DAY_S = 86400.0  # never reached: how long a rank takes to start is the machine's business


def _join(rank: int, num_processes: int, port: int, folder: Path, absent: bool, told: Any) -> None:
    join(rank, num_processes, port)
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    group = dist.new_group(backend="gloo")
    try:
        await_ranks(group, "the start of training", DAY_S)
        if absent and rank == 1:
            told.get()  # stays away until rank 0 has given up
        else:
            await_ranks(group, "the checkpoint of step 4", 1 if absent else DAY_S)
            told.put("passed")
    except MissingRanksError as error:
        told.put("")
        (folder / "message").write_text(f"{error.ranks}: {error}")


@pytest.mark.parametrize("absent", [True, False])
def test_the_missing_rank_is_named(
    tmp_path: Path, absent: bool, spawn: Callable[..., None]
) -> None:
    told = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_join, 2, tmp_path, absent, told)
    if absent:
        assert (tmp_path / "message").read_text() == (
            "[1]: ranks 1 of 2 did not reach the checkpoint of step 4 within 1 s: look at their logs and "
            "their nodes"
        )
    else:
        assert [told.get(), told.get()] == ["passed", "passed"]


def _end_early(rank: int, num_processes: int, port: int, folder: Path) -> None:
    join(rank, num_processes, port)
    with naming_lost_ranks():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        dist.barrier()
        if rank == 1:
            os._exit(0)
        try:
            with naming_lost_ranks():
                dist.barrier()
        except MissingRanksError as error:
            (folder / "message").write_text(str(error))
    dist.destroy_process_group()  # nobody is left to part with


def test_a_rank_that_ends_is_one_line(tmp_path: Path, spawn: Callable[..., None]) -> None:
    spawn(_end_early, 2, tmp_path)
    message = (tmp_path / "message").read_text()
    assert message.startswith("rank 0 of 2 lost the others: ")
    assert message.endswith("never started: look at the first error in the logs of all ranks")
    assert "\n" not in message


def test_a_rank_that_never_comes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MissingRanksError, match=r"rank 0 of 2 lost the others: Timed out .* 1/2"):
        _wait_alone()
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="^something else$"), naming_lost_ranks():
        raise RuntimeError("something else")


def _wait_alone() -> None:
    with naming_lost_ranks():
        dist.init_process_group(
            "gloo", "tcp://127.0.0.1:0", rank=0, world_size=2, timeout=datetime.timedelta(seconds=1)
        )


def test_flight_recorder_keeps_the_users_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "")
    monkeypatch.delenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    record_collectives(tmp_path / "nccl")
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "nccl" / "rank_")


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.watchdog\.timeout_s=0"):
        WatchdogOptions(timeout_s=0)
