"""The verb scaling: real runs on the CPU, failing ones among them, and the comparison of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.planning.options import PlanConfig
from ic.studies.ablation.options import AblationConfig
from ic.studies.benchmark_preference_options import PreferenceBenchmarkOptions
from ic.studies.scaling.options import ScalingCase, ScalingConfig, ScalingOptions
from ic.studies.scaling.report import draw_scaling
from ic.studies.scaling.run import compare, gpu_counts

COMMON = (
    "model=mla_tiny",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=1",
    "trainer.accelerator=cpu",
    "data.context_length=256",
    "data.tokens_per_batch=512",
)
CASES = (
    "[{name: alone, devices: [1]},"
    " {name: refused, devices: [1], overrides: ['strategy=fsdp']},"
    " {name: gloo, devices: [2], overrides: ['strategy=ddp',"
    " 'strategy.process_group_backend=gloo']},"
    " {name: no GPUs, devices: [64], overrides: ['trainer.accelerator=gpu']}]"
)
TOKENS = 512


@pytest.mark.slow
def test_cases_are_measured_and_a_failing_one_is_reported(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    figures: list[Figure],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    common = ",".join(f"'{override}'" for override in COMMON)
    code = ic(
        "scaling",
        f"scaling.common=[{common}]",
        f"scaling.cases={CASES}",
        "scaling.warmup_steps=1",
        "scaling.timed_steps=2",
        "scaling.case_timeout_s=86400",
        "scaling.baseline=gloo",
        "scaling.output=out/scaling.json",
    )
    assert code == 1
    out = capfd.readouterr().out
    rows = json.loads((tmp_path / "out/scaling.json").read_text())["rows"]
    alone, refused, gloo, absent = rows
    assert [row["status"] for row in rows] == ["measured", "failed", "measured", "skipped"]
    for number, row in enumerate(rows, 1):
        assert f"{number}/4 {row['name']}, " in out

    for row, processes in ((alone, 1), (gloo, 2)):
        assert row["num_processes"] == row["num_gpus"] == processes
        assert row["context_length_tokens"] == 256
        assert row["tokens_per_step"] == processes * TOKENS
        assert row["num_steps_timed"] == 2
        assert row["step_time_p10_s"] <= row["step_time_median_s"] <= row["step_time_p90_s"]
        # The mean of two steps is their median.
        assert row["tokens_per_s"] == pytest.approx(
            row["tokens_per_step"] / row["step_time_median_s"]
        )
        assert row["peak_bytes_per_gpu"] > 0
        assert row["mfu"] is row["gpu_utilisation"] is None
    assert (gloo["strategy"], gloo["process_group_backend"]) == ("ddp", "gloo")
    assert gloo["ratio_to_baseline"] == 1
    assert alone["ratio_to_baseline"] is None
    assert alone["scaling_efficiency"] == 1
    speeds = gloo["tokens_per_s"], alone["tokens_per_s"]
    assert gloo["scaling_efficiency"] == pytest.approx(speeds[0] / (2 * speeds[1]))

    assert "exit code 2: ic: strategy.name=fsdp" in refused["reason"]
    assert any("FSDP needs GPUs" in line for line in refused["log_tail"])
    assert "needs 64 GPUs, this host has" in absent["reason"]
    (figure,) = figures
    assert shown(figure.axes[0]) == {
        "alone\n1 GPU, 256 tokens": alone["tokens_per_s"],
        "gloo\n2 GPUs, 256 tokens": gloo["tokens_per_s"],
    }
    assert figure.get_suptitle() == "Training by strategy, cpu"
    assert (tmp_path / "out/scaling.png").is_file()


def shown(axes: Axes) -> dict[str, float]:
    """Widths of the bars of a single series, by the name beside them."""
    names = [text.get_text() for text in axes.get_yticklabels()]
    return {
        names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axes.patches
    }


def test_the_plot_shows_speed_and_share(tmp_path: Path, figures: list[Figure]) -> None:
    cells = {"device": "H100", "context_length_tokens": 4096, "status": "measured"}
    rows = [
        cells
        | {"name": "one", "num_gpus": 1, "tokens_per_s": 1234.5, "mfu": 0.5}
        | {"gpu_utilisation": 0.875},
        {"status": "failed", "name": "broken"},
        cells
        | {"name": "four", "num_gpus": 4, "tokens_per_s": 4000.0, "mfu": None}
        | {"gpu_utilisation": 0.25},
    ]
    draw_scaling(rows, tmp_path / "plot.png")
    (figure,) = figures
    speed, share = figure.axes
    assert shown(speed) == {"one\n1 GPU, 4,096 tokens": 1234.5, "four\n4 GPUs, 4,096 tokens": 4000}
    assert [text.get_text() for text in speed.texts] == ["1,234", "4,000"]
    mfu, busy = share.containers
    assert [(bar.get_width(), round(bar.get_y() + 0.19, 1)) for bar in mfu] == [(50, -0.2)]
    assert [(bar.get_width(), round(bar.get_y() + 0.19, 1)) for bar in busy] == [
        (87.5, 0.2),
        (25, 1.2),
    ]
    assert [text.get_text() for text in share.texts] == ["50 %", "88 %", "25 %"]
    assert share.get_legend().get_texts()[0].get_text() == "MFU"
    assert (speed.get_xlabel(), share.get_xlabel()) == ("tokens/s, all GPUs together", "per cent")


def test_a_case_that_hangs_is_ended(
    ic: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    cases = "[{name: slow, devices: [1], overrides: ['trainer.accelerator=cpu']}]"
    code = ic(
        "scaling",
        f"scaling.cases={cases}",
        "scaling.common=[]",
        "scaling.case_timeout_s=0.2",
        "scaling.output=scaling.json",
    )
    (row,) = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert code == 1
    assert row["reason"] == "took longer than scaling.case_timeout_s=0.2"


def test_without_a_gpu_nothing_is_overwritten(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    published = tmp_path / "runs/scaling.json"
    published.parent.mkdir()
    published.write_text('{"rows": ["measured"]}')
    assert ic("scaling") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this host has 0 GPUs and every case needs 1 or more" in line
    assert "trainer.accelerator=cpu" in line
    assert published.read_text() == '{"rows": ["measured"]}'
    assert [path.name for path in published.parent.iterdir()] == ["scaling.json"]


def test_a_published_file_is_written_only_when_it_is_named() -> None:
    """Of every verb that measures: defaults lie below `runs/`."""
    scaling, _ = compose_config("scaling", ScalingConfig, [])
    ablation, _ = compose_config("ablation", AblationConfig, [])
    preference, _ = compose_config("benchmark_preference", PreferenceBenchmarkOptions, [])
    plan, _ = compose_config("plan", PlanConfig, [])
    outputs = [
        scaling.scaling.output,
        ablation.ablation.output,
        preference.output,
        *(str(plan.plan.output_file(f"{name}.json")) for name in ("memory", "cache")),
    ]
    assert [str(Path(output).parent) for output in outputs] == ["runs"] * 5
    named, _ = compose_config("plan", PlanConfig, ["plan.output=docs/results/cache-memory.json"])
    assert named.plan.output_file("memory.json") == Path("docs/results/cache-memory.json")


def measured(name: str, gpus: int, speed: float, *overrides: str) -> dict[str, Any]:
    return {
        "status": "measured",
        "name": name,
        "num_gpus": gpus,
        "tokens_per_s": speed,
        "overrides": [*overrides, f"trainer.devices={gpus}"],
    }


def test_rows_are_compared_with_those_that_train_the_same() -> None:
    short, long = "data.context_length=4", "data.context_length=32"
    rows = [
        measured("one", 1, 100.0, long),
        measured("one, short", 1, 200.0, short),
        measured("base", 2, 80.0, long, "strategy=ddp"),
        measured("base", 4, 160.0, long, "strategy=ddp"),
        measured(
            "new", 4, 360.0, short, long, "strategy=fsdp2", "strategy.context_parallel_size=4"
        ),
        measured("compiled", 4, 400.0, long, "strategy=fsdp2", "model.compile=true"),
        {"status": "failed", "name": "base", "num_gpus": 4, "overrides": [long]},
    ]
    compare(rows, "base")
    shown = [(r["ratio_to_baseline"], r["scaling_efficiency"]) for r in rows[:-1]]
    assert shown == [(None, 1), (None, 1), (1, 0.4), (1, 0.4), (2.25, 0.9), (None, None)]


@pytest.mark.slow
def test_default_cases_are_valid_overrides_of_fit() -> None:
    config, _ = compose_config("scaling", ScalingConfig, [])
    options = config.scaling
    assert options.baseline in [case.name for case in options.cases]
    for case in options.cases:
        for n in case.devices or (2, 4):
            overrides = [o.replace("{devices}", str(n)) for o in case.overrides]
            run, _ = compose_config("fit", RunConfig, [*options.common, *overrides])
            assert run.data.tokens_per_batch >= run.data.context_length
            assert run.strategy.context_parallel_size in (1, n)
            assert run.optimizer.name == "adamw" or case.devices == [1]


@pytest.mark.parametrize(
    ("gpus", "counts"), [(0, [2]), (1, [2]), (2, [2]), (3, [2]), (4, [2, 4]), (8, [2, 4, 8])]
)
def test_gpu_counts(gpus: int, counts: list[int]) -> None:
    assert gpu_counts(gpus) == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": [ScalingCase("a"), ScalingCase("a")]}, "a: give each case its own name"),
        (
            {"cases": [ScalingCase("fsdp2")], "only": ["fsdp"]},
            "unknown case .* 'fsdp'; did you mean fsdp2",
        ),
        ({"timed_steps": 0}, "scaling.timed_steps=0: must be at least 1"),
        ({"case_timeout_s": 0.0}, "must be above 0"),
        ({"output": "x.csv"}, "must end in .json"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalingOptions(**options)


def test_a_row_is_measured_once() -> None:
    with pytest.raises(ValueError, match=r"'a': devices=\[2, 2\]: give each one once"):
        ScalingCase("a", devices=[2, 2])
    with pytest.raises(ValueError, match=r"lengths=\[512, 512\]: give each one once"):
        PreferenceBenchmarkOptions(lengths=[512, 512])


def test_without_a_measured_row_there_is_no_plot(tmp_path: Path) -> None:
    draw_scaling([{"status": "failed", "name": "a"}], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
