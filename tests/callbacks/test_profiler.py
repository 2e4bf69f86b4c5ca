"""A real profile on the CPU: the trace opens, the table names the model's operators."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from ic.callbacks import profiler
from ic.callbacks.options import ProfilerOptions
from tests.conftest import SHORT

QUIET = (
    *SHORT,
    "callbacks=profiler",
    "callbacks.passkey=null",
    "callbacks.checkpoint=null",
    "callbacks.context_length=null",
    "callbacks.profiler.wait_steps=1",
    "callbacks.profiler.warmup_steps=1",
    "trainer.limit_val_batches=0",
)


@pytest.mark.slow
def test_profile(ic: Callable[..., int], tmp_path: Path) -> None:
    assert ic(*QUIET, "trainer.max_steps=6", "callbacks.profiler.active_steps=2") == 0
    folder = tmp_path / "runs/debug/default/profile"
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    steps = {e["name"] for e in trace["traceEvents"] if "ProfilerStep" in e.get("name", "")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    kernels = json.loads((folder / "kernels.json").read_text())["kernels"]
    times = [kernel["self_time_us"] for kernel in kernels]
    assert times == sorted(times, reverse=True)
    assert "aten::mm" in {kernel["name"] for kernel in kernels}
    assert "aten::mm" in (folder / "kernels.txt").read_text()
    memory = json.loads(gzip.decompress((folder / "memory.json.gz").read_bytes()))
    assert len(memory) > 100
    at = [event["time_us"] for event in memory]
    assert at == sorted(at)


def test_a_run_too_short_says_so(
    ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic(*QUIET, "trainer.max_steps=2") == 0
    assert "no profile: the run ended after 2 micro-batches" in capsys.readouterr().err
    assert not (tmp_path / "runs/debug/default/profile").exists()


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.profiler\.warmup_steps=0"):
        ProfilerOptions(warmup_steps=0)


@pytest.mark.slow
def test_a_cpu_is_profiled_without_cuda(
    ic: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[ProfilerActivity]] = []

    class Traced(profile):
        def __init__(self, **settings: Any) -> None:
            asked.append(settings["activities"])
            super().__init__(**settings)

    monkeypatch.setattr(profiler, "profile", Traced)
    assert ic(*QUIET, "trainer.max_steps=6", "callbacks.profiler.active_steps=2") == 0
    assert asked == [[ProfilerActivity.CPU]]
