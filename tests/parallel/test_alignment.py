"""Preference training and LoRA spread over processes give what one process gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.alignment_run import STEPS, Case, run_case, run_rank, write_data
from tests.parallel.test_equal_to_one_process import answers, compare

WAYS = {
    "dp2": (2, Case(strategy="fsdp2")),
    "cp2, reference in memory": (2, Case(strategy="fsdp2", context=2, on_disk=False)),
    "dp2 x cp2, accumulate": (
        4,
        Case(strategy="fsdp2", context=2, accumulate=2, checkpointing=True),
    ),
    "LoRA, dp2, accumulate, reference in memory": (
        2,
        Case(lora=True, strategy="fsdp2", accumulate=2, on_disk=False),
    ),
    "LoRA, cp2": (2, Case(lora=True, strategy="fsdp2", context=2)),
    "SFT, LoRA, dp2": (2, Case("sft", lora=True, strategy="fsdp2")),
    "distillation, ddp": (2, Case("sft", distil=True, strategy="ddp")),
    "distillation, dp2, accumulate": (2, Case("sft", distil=True, strategy="fsdp2", accumulate=2)),
    "SFT, LoRA, cp2": (2, Case("sft", lora=True, strategy="fsdp2", context=2, accumulate=2)),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alignment")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def one_process(
    tmp_path_factory: pytest.TempPathFactory, data: Path
) -> Callable[[Case], tuple[dict[str, Any], Path]]:
    known: dict[Case, tuple[dict[str, Any], Path]] = {}

    def run(case: Case) -> tuple[dict[str, Any], Path]:
        alone = Case(case.data, lora=case.lora, distil=case.distil)
        if alone not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[alone] = run_case(alone, 1, data, folder), folder
        return known[alone]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_equal_to_one_process(
    way: str,
    one_process: Callable[[Case], tuple[dict[str, Any], Path]],
    spawn: Callable[..., None],
    data: Path,
    tmp_path: Path,
) -> None:
    num_processes, case = WAYS[way]
    spawn(run_rank, num_processes, case, data, tmp_path)
    alone, folder = one_process(case)
    for rank in range(num_processes):
        got = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert len(got["train"]) == STEPS
        for given, expected in zip(got["train"], alone["train"], strict=True):
            same_metrics(given, expected)
        assert len(got["validation"]) == 1 + case.on_disk
        for given in got["validation"]:
            same_metrics(given, alone["validation"][0])
        for given, expected in zip(got["gradients"], alone["gradients"], strict=True):
            compare(given, expected, 5e-5)
        compare(got["weights"], alone["weights"], 5e-5)
        assert got["frozen"].keys() == alone["frozen"].keys()
        assert all(tensor.equal(alone["frozen"][name]) for name, tensor in got["frozen"].items())
        if not case.on_disk and not case.lora:
            # Whole only while it computes.
            assert max(got["reference_shares"]) < 0.8
            assert got["reference_is_split"]
    if case.data == "sft":
        assert answers(tmp_path) == answers(folder)
    elif case.on_disk:
        ours, theirs = (path / "run/default/reference.jsonl" for path in (tmp_path, folder))
        same_reference(ours, theirs, case.context)


def same_metrics(given: dict[str, float], expected: dict[str, float]) -> None:
    assert given.keys() == expected.keys()
    at_reference = expected.get("train/rewards/margins") == pytest.approx(0, abs=1e-5)
    for name, value in expected.items():
        if not (at_reference and "accuracies" in name):  # a comparison of rounding errors
            assert given[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name


def same_reference(given: Path, expected: Path, context: int) -> None:
    """The same file; with context parallelism up to the rounding of sums in another order."""
    if context == 1:
        assert given.read_bytes() == expected.read_bytes()
        return
    ours, theirs = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (given, expected)
    )
    assert ours[0] == theirs[0]
    assert [row["key"] for row in ours[1:]] == [row["key"] for row in theirs[1:]]
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        assert our["row"] == their["row"]
        for column in ("chosen", "rejected"):
            assert our[column] == pytest.approx(their[column], rel=1e-5, abs=1e-5)
    assert not list(given.parent.glob("*.partial"))
