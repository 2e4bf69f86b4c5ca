"""Ranks that do not come to the first meeting are named, and none outlives the first."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Linear, Module

from ic.parallel.ddp import MeetingDDPStrategy
from ic.parallel.launch import ending_together
from ic.parallel.meeting import all_met, meshes
from ic.parallel.options import StrategyOptions
from ic.parallel.watchdog import MissingRanksError
from tests.conftest import SHORT, host_store

BRIEF_S = 1  # long enough to reach the store on a busy machine


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of a launcher, which holds it open for all ranks."""
    store = host_store()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def rank_of_three(rank: int) -> LightningEnvironment:
    environment = LightningEnvironment()
    environment.set_world_size(3)
    environment.set_global_rank(rank)
    return environment


def test_who_did_not_come_is_named(meeting: dist.TCPStore) -> None:
    def come(rank: int) -> None:
        with all_met(rank_of_three(rank), BRIEF_S):
            pass

    for rank, absent, said in (
        (1, [0, 2], "ranks 0, 2 of 3 did not come to the first meeting within 1 s: look at"),
        (0, [2], "rank 2 of 3 did not come to the first meeting within 1 s: look at"),
    ):
        with pytest.raises(MissingRanksError, match=said) as refusal:
            come(rank)
        assert refusal.value.ranks == absent
    come(2)  # the others have left their words


def test_no_store_is_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    store = host_store()
    port = str(store.port)
    del store  # nothing listens there now
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with (
        pytest.raises(MissingRanksError, match=rf"^rank 0 of 3 .* \(at 127.0.0.1:{port}\)"),
        all_met(rank_of_three(1), 1),
    ):
        pass


@pytest.mark.parametrize(
    "command",
    [
        (*SHORT, "strategy=auto", "strategy.rendezvous_timeout_s=1", "trainer.devices=2"),
        (*SHORT, "strategy=fsdp2", "strategy.rendezvous_timeout_s=1", "trainer.devices=2"),
    ],
    ids=["ddp", "fsdp2"],
)
def test_a_run_without_its_second_rank_is_one_line(
    ic: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    meeting: dist.TCPStore,
    tmp_path: Path,
    command: tuple[str, ...],
) -> None:
    for name, value in (
        *(("RANK", "0"), ("LOCAL_RANK", "0"), ("GROUP_RANK", "0")),
        *(("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "ic")),
    ):
        monkeypatch.setenv(name, value)
    assert ic(*command, "trainer.accelerator=cpu", "logger=none", "callbacks.memory=null") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ic: rank 1 of 2 did not come to the first meeting within 1 s: look at their logs and "
        "their nodes, or give slow ones longer (strategy.rendezvous_timeout_s)"
    )
    assert not dist.is_initialized()
    assert not (tmp_path / "runs/debug/default/.lock").exists()


def test_an_error_of_the_first_ends_those_it_started() -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    other = subprocess.Popen(["sleep", "86400"])
    launcher.procs.append(other)
    strategy = MeetingDDPStrategy(None, 1.0)
    strategy._launcher = launcher
    with ending_together(strategy):
        pass
    assert other.poll() is None
    with pytest.raises(RuntimeError, match="^the first fails$"), ending_together(strategy):
        raise RuntimeError("the first fails")
    assert other.returncode == -15


def test_ddp_wraps_on_the_stream_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another one every backward pass would wait, and PyTorch say so."""
    wrapped: list[object] = []

    def wrap(model: Module, **options: object) -> Module:
        wrapped.append(options["device_ids"])
        return model

    monkeypatch.setattr("torch.cuda.Stream", lambda *_: pytest.fail("another stream"))
    for module in ("ic.parallel.ddp", "lightning.pytorch.strategies.ddp"):
        monkeypatch.setattr(f"{module}.DistributedDataParallel", wrap, raising=False)
    strategy = MeetingDDPStrategy(None, 1.0)
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: [0])
    model = Linear(2, 2)
    assert strategy._setup_model(model) is model
    assert wrapped == [[0]]


def test_meshes_are_found_without_touching_other_objects() -> None:
    """PyTorch's `reduce_op` warns of itself when it is asked for its class."""

    class Touchy:
        def __getattribute__(self, name: str) -> object:
            raise AssertionError(f"asked for {name}")

    touchy = Touchy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = len(meshes())
        mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
        assert any(each is mesh for each in meshes())
        assert len(meshes()) == before + 1
    del touchy


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="strategy.rendezvous_timeout_s=0: must be above 0"):
        StrategyOptions(rendezvous_timeout_s=0)
