"""The ladder: stages start from the weights before them, finished ones are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ic.config.compose import compose_config
from ic.studies.ladder_options import LadderConfig, LadderStage
from tests.test_experiments import SHRINK


def test_the_declared_stages() -> None:
    config, _ = compose_config("ladder", LadderConfig, [])
    assert [s.experiment for s in config.stages] == ["mla_4k", "mla_32k", "mla_128k", "mla_1m"]
    assert [s.keep for s in config.stages] == [[], ["weights"], ["weights"], ["weights"]]


@pytest.mark.slow
def test_stages_follow_each_other_and_resume(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    quick = [*SHRINK, "logger=none", "callbacks.passkey=null"]
    stages = (
        "[{experiment: mla_4k, keep: [], reset: [weights, optimizer, schedule, step, data_position,"
        " curriculum]}, {experiment: mla_32k}]"
    )
    quoted = ",".join(f"'{override}'" for override in quick)
    args = ("ladder", f"stages={stages}", f"overrides=[{quoted}]")
    assert ic(*args) == 0
    second = tmp_path / "runs/mla_32k/default"
    told = yaml.safe_load((second / "config.yaml").read_text())
    assert told["model"]["init_from"] == "runs/mla_4k/default/checkpoints/last"
    assert (second / "checkpoints/last/model.safetensors").is_file()
    capfd.readouterr()
    assert ic(*args) == 0
    assert capfd.readouterr().err.count(": finished, see") == 2


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            LadderStage(
                "b", ["weights", "optimizer"], ["schedule", "step", "data_position", "curriculum"]
            ),
            r"keep=\['weights', 'optimizer'\]: only weights can be kept",
        ),
        (LadderStage("b", ["weights"], ["optimizer"]), "must name each of weights, optimizer"),
    ],
)
def test_bad_stages(stage: LadderStage, message: str) -> None:
    first = LadderStage("a", [], ["weights", *LadderStage().reset])
    with pytest.raises(ValueError, match=message):
        LadderConfig([first, stage])
    with pytest.raises(ValueError, match="the first stage has none before it"):
        LadderConfig([dataclasses.replace(LadderStage("a"))])
