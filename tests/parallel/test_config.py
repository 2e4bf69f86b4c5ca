"""Strategies that cannot run as configured are refused with what to change."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from ic.parallel.options import StrategyOptions
from tests.conftest import SHORT

RUN = {"accelerator": "gpu", "gpus": 4, "precision": "bf16-mixed", "optimizer": "adamw"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "deepspeed"}, "strategy.name='deepspeed': choose one of auto, ddp, fsdp, fsdp2"),
        ({"context_parallel_size": 0}, "context_parallel_size=0: must be at least 1"),
        (
            {"name": "ddp", "context_parallel_size": 2},
            "context_parallel_size=2 needs strategy=fsdp2, not 'ddp'",
        ),
    ],
)
def test_bad_values(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrategyOptions(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "run", "message"),
    [
        ({"name": "fsdp"}, {"accelerator": "cpu"}, "fsdp with trainer.accelerator=cpu on 4 GPUs"),
        ({"name": "fsdp"}, {"accelerator": "auto", "gpus": 0}, "accelerator=auto on 0 GPUs"),
        ({"name": "fsdp"}, {"optimizer": "muon"}, "optimizer.name=muon with strategy.name=fsdp"),
        ({"name": "fsdp2"}, {"precision": "16-mixed"}, "precision=16-mixed with .*name=fsdp2"),
        ({"process_group_backend": "nccl"}, {"accelerator": "cpu"}, "backend=nccl .* needs GPUs"),
    ],
)
def test_combinations(settings: dict[str, str], run: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrategyOptions(**settings).check_run(**{**RUN, **run})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp", "fsdp2"])
def test_good_combinations(name: str) -> None:
    StrategyOptions(name=name).check_run(**RUN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (("experiment=dpo_tiny",), "does not run preference training"),
        (("experiment=sft_tiny", "model/adapter=lora"), r"does not run LoRA \(model/adapter\)"),
    ],
)
def test_fsdp_refuses(
    settings: tuple[str, ...], what: str, ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic("fit", *settings, "strategy=fsdp") == 2
    assert re.search(f"strategy=fsdp {what}; choose strategy=fsdp2", capsys.readouterr().err)


def test_the_command_line_prints_one_line(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic(*SHORT, "strategy=fsdp", "trainer.accelerator=cpu") == 2
    assert "choose strategy=fsdp2 or ddp on a CPU" in capsys.readouterr().err
