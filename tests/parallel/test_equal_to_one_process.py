"""Every way to spread a run over processes gives what one process gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.evaluation.answered import read_samples, sample_key
from tests.parallel.training_run import STEPS, Case, run_case, run_rank

PLAIN = Case()
PACKED = Case(documents=True)
WAYS = {
    "ddp": (2, replace(PLAIN, strategy="ddp")),
    "dp2": (2, replace(PLAIN, strategy="fsdp2", passkey=True)),
    "dp2, accumulate": (2, replace(PLAIN, strategy="fsdp2", accumulate=2, optimizer="adamw")),
    "cp2": (
        2,
        replace(
            PLAIN, strategy="fsdp2", context=2, checkpointing=True, passkey=True, validate=True
        ),
    ),
    "cp2, documents, accumulate": (2, replace(PACKED, strategy="fsdp2", context=2, accumulate=2)),
    "dp2 x cp2, documents": (
        4,
        replace(PACKED, strategy="fsdp2", context=2, accumulate=2, passkey=True),
    ),
    "cp4": (4, replace(PLAIN, strategy="fsdp2", context=4, optimizer="adamw")),
}


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], dict[str, Any]]:
    known: dict[Case, dict[str, Any]] = {}

    def run(case: Case) -> dict[str, Any]:
        alone = Case(
            documents=case.documents,
            optimizer=case.optimizer,
            passkey=True,
            accelerator=case.accelerator,
        )
        if alone not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[alone] = {**run_case(alone, 1, folder), "answers": answers(folder)}
        return known[alone]

    return run


def answers(folder: Path) -> list[dict[str, Any]]:
    rows = sorted(
        read_samples(folder / "run/default/passkey"), key=lambda row: str(sample_key(row))
    )
    return [{k: v for k, v in row.items() if k not in ("seconds", "model")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_training_and_evaluation(
    way: str,
    one_process: Callable[[Case], dict[str, Any]],
    spawn: Callable[..., None],
    tmp_path: Path,
) -> None:
    num_processes, case = WAYS[way]
    tolerance = 1e-12 if case.optimizer == "muon" else 5e-5  # float64, float32
    spawn(run_rank, num_processes, case, tmp_path)
    alone = one_process(case)
    for rank in range(num_processes):
        got = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert len(got["losses"]) == STEPS
        assert got["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        validations = alone["validation"]
        if case.validate:
            validations = [*validations, validations[-1]]
        for given, expected in zip(got["validation"], validations, strict=True):
            assert given == pytest.approx(expected, rel=2e-6)
        for step in range(STEPS):
            compare(got["gradients"][step], alone["gradients"][step], tolerance)
        compare(got["weights"], alone["weights"], tolerance)
    if case.passkey:
        assert answers(tmp_path) == alone["answers"]


GPU_WAYS = {
    "fsdp": Case(strategy="fsdp", accumulate=2, optimizer="adamw", passkey=True),
    "dp2": Case(strategy="fsdp2", accumulate=2, optimizer="adamw", passkey=True),
    "cp2, documents": Case(strategy="fsdp2", context=2, documents=True, optimizer="adamw"),
}


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", GPU_WAYS)
def test_two_gpus(
    way: str,
    one_process: Callable[[Case], dict[str, Any]],
    spawn: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Over NCCL; `fsdp` runs nowhere else. Clipping is active, so its losses show it."""
    case = replace(GPU_WAYS[way], accelerator="gpu")
    spawn(run_rank, 2, case, tmp_path)
    alone = one_process(case)
    got = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert got["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for given, expected in zip(got["validation"], alone["validation"], strict=True):
        assert given == pytest.approx(expected, rel=1e-4)
    if case.passkey:
        assert answers(tmp_path) == alone["answers"]


def compare(given: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (given[name] - tensor).norm() / tensor.norm()
        assert error < tolerance, f"{name}: {error}"
