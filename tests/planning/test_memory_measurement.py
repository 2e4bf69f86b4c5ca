"""`plan.measure=true` runs each case and writes what `plan` reads. The GPU's meter is set by hand:
the figures themselves are right only on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ic.config.compose import compose_config
from ic.planning.measurements import Measurements
from ic.planning.memory_measurement import CASES, read_cases
from ic.planning.options import PlanConfig
from ic.planning.plan import Planner

SMALL = [
    "experiment=mla_tiny",
    "trainer.accelerator=cpu",
    "data.context_length=128",
    "data.tokens_per_batch=256",
    "model.num_hidden_layers=1",
]
# What the CUDA driver and the allocator would say.
METER = {
    "is_available": True,
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "max_memory_allocated": 8_000_000,
    "max_memory_reserved": 10_000_000,
    "memory_reserved": 10_000_000,
    "mem_get_info": (60_000_000, 100_000_000),
    "get_device_name": "NVIDIA H200",
}


@pytest.mark.slow
def test_rows_are_what_plan_reads(
    ic: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in METER.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    cases = [SMALL, [*SMALL, "model.gradient_checkpointing=true"]]
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    assert ic("plan", "plan.measure=true", "plan.cases=cases.yaml") == 0

    rows = json.loads((tmp_path / "runs/plan-memory.json").read_text())["rows"]
    assert [row["overrides"] for row in rows] == cases
    for row in rows:
        liger = f"plan.liger={row['liger']}"  # Liger's kernels, if they are installed
        config, _ = compose_config("plan", PlanConfig, [*row["overrides"], liger])
        planner = Planner(config)
        assert row["predicted_peak_bytes"] == planner.training(2, 128).total_bytes
        assert row["error_share"] == row["predicted_peak_bytes"] / 8_000_000 - 1
        assert row["context_bytes"] == 30_000_000
    found = Measurements.of_results(tmp_path / "runs")
    overhead = found.overhead()
    assert (overhead.context_bytes, overhead.slack_share) == (30_000_000, 0.25)
    assert overhead.source == "median of 2 cases in plan-memory.json"
    assert found.memory_bytes("NVIDIA H200") == 100_000_000


def test_without_a_gpu_it_is_refused(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for what in ("measure", "cache"):
        assert ic("plan", f"plan.{what}=true") == 2
        assert f"plan.{what}=true: PyTorch sees no CUDA GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cases_compose_and_fit_80_gb() -> None:
    cases = read_cases(CASES)
    assert len(cases) >= 6
    for overrides in cases:
        config, _ = compose_config("plan", PlanConfig, [*overrides, "plan.num_gpus=1"])
        planner = Planner(config)
        rows, tokens = planner.batch_shape()
        assert planner.needed_bytes(planner.training(rows, tokens)) < 72 * 10**9, overrides
        # Four steps of at most 2e15 FLOPs take seconds on a GPU that does 4e14 per second.
        assert planner.speed()["train_flops_per_token"] * rows * tokens < 2e15, overrides


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("a: 1", "must hold a list of lists of overrides"),
        ("[]", "must hold a list of lists of overrides"),
        ("[experiment=mla_tiny]", "must hold a list of lists of overrides"),
    ],
)
def test_bad_cases(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "cases.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cases(path)
