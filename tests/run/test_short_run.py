"""A run that is shorter than its intervals still says how it went, and what it may not have meant."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.run.notices import notices
from ic.run.resume import Start

SHORT = (
    "experiment=mla_tiny",
    "data.context_length=256",
    "data.tokens_per_batch=256",
    "data.val_batches=1",
    "callbacks.context_length.start_length=128",
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "logger.tensorboard=false",
    "trainer.max_steps=3",
    "model/adapter=lora",
)


def test_loss_and_validation_of_a_short_run(
    ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic("fit", *SHORT, "trainer.log_every_n_steps=100") == 0
    (metrics,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "2"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["2"]
    said = capsys.readouterr().err
    # LoRA's two matrices on each of four layers' projections, of three layers.
    assert "mla_tiny: 654,412 parameters, trainable 52,992 of 707,404 parameters, " in said
    assert "warning: model/adapter=lora on random weights: what stays frozen was never" in said
    assert "warning: optimizer.warmup_steps=30 is beyond trainer.max_steps=3" in said


@pytest.mark.parametrize(
    ("overrides", "start", "expected"),
    [
        (["trainer.max_steps=100", "optimizer.warmup_steps=100"], Start(), []),
        (["trainer.max_steps=99", "optimizer.warmup_steps=100"], Start(), ["optimizer.warmup"]),
        (
            ["trainer.max_steps=-1", "trainer.max_time=00:00:01:00", "optimizer.warmup_steps=100"],
            Start(),
            [],
        ),
        (["model/adapter=lora"], Start(), ["model/adapter=lora on random weights"]),
        (["model/adapter=lora", "model.init_from=x"], Start(), []),
        (
            ["model.fp8=rowwise", "trainer.accelerator=gpu"],
            Start(),
            ["model.fp8=rowwise without model.compile=true"],
        ),
        (["model.fp8=rowwise", "trainer.accelerator=gpu", "model.compile=true"], Start(), []),
        (["model/adapter=lora"], Start(Path("step=1")), []),
    ],
)
def test_notices(overrides: list[str], start: Start, expected: list[str]) -> None:
    config, _ = compose_config("fit", RunConfig, overrides)
    said = notices(config, start)
    assert len(said) == len(expected)
    assert all(line.startswith(begin) for line, begin in zip(said, expected, strict=True))
