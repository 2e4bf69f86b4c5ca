"""The verb ablation: real runs of a tiny model on the CPU, a failing one, resume, and the table."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from ic.config.compose import compose_config
from ic.config.flags import split_flags
from ic.config.run import RunConfig
from ic.evaluation.answered import cells_of, read_samples
from ic.studies.ablation.options import AblationConfig, AblationOptions, AblationVariant
from ic.studies.ablation.report import ablation_cells, draw_ablation, training_share
from ic.studies.ablation.run import visible_gpus
from ic.studies.ablation.variants import plan_runs

COMMON = [
    "experiment=mla_tiny",
    "logger=none",
    "trainer.max_steps=8",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=0",
    "data.context_length=256",
    "data.tokens_per_batch=512",
    "callbacks.checkpoint=null",
    "callbacks.memory=null",
    "optimizer.warmup_steps=3",
    "callbacks.context_length.threshold=0.0001",
    "callbacks.context_length.check_every_n_steps=3",
    "evaluation.tasks=[single,multi_key]",
    "evaluation.lengths=[512,640]",
    "evaluation.samples=2",
    "evaluation.depths=[0.0,0.5]",
    "evaluation.control_samples=1",
]
VARIANTS = (
    "[{name: base}, {name: no curriculum, overrides: ['callbacks.context_length=null']},"
    " {name: broken, overrides: ['tokenizer=./nowhere']}]"
)


@pytest.fixture
def ablation(ic: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("IC_COMMIT", "abc")
    common = ",".join(f"'{override}'" for override in COMMON)

    def run(*args: str) -> int:
        return ic(
            "ablation",
            f"ablation.common=[{common}]",
            f"ablation.variants={VARIANTS}",
            "ablation.seeds=[7]",
            "ablation.jobs=3",
            "ablation.max_time_s=86400",
            "ablation.run_timeout_s=100000",
            "ablation.output=out/small.json",
            *args,
        )

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "out/small.json").read_text())["rows"]


@pytest.mark.slow
def test_runs_are_read_resumed_and_reported(
    ablation: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    figures: list[Figure],
) -> None:
    assert ablation() == 1
    out = capfd.readouterr().out
    base, fixed, broken = rows_of(tmp_path)
    assert [r["variant"] for r in (base, fixed, broken)] == ["base", "no curriculum", "broken"]
    assert [r["status"] for r in (base, fixed, broken)] == ["measured", "measured", "failed"]
    assert "exit code 2: ic: tokenizer='./nowhere'" in broken["reason"]
    assert "broken, seed 7: failed, exit code 2" in out
    for row, folder in ((base, "base"), (fixed, "no-curriculum")):
        check_against_its_folder(row, tmp_path / f"runs/small/{folder},seed=7")
    assert [r["context_length_tokens"] for r in base["context_lengths"]] == [128, 256]
    seconds = [r["elapsed_s"] for r in base["context_lengths"]]
    assert seconds[0] == 0 < seconds[1] < base["wall_s"]
    assert fixed["context_lengths"] == [{"context_length_tokens": 256, "step": 0, "elapsed_s": 0.0}]
    (figure,) = figures
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "no curriculum"]
    assert figure.get_suptitle().startswith("Synthetic passkeys after 86400 s of training")
    assert (tmp_path / "out/small.png").is_file()

    # Only the failed run would start again, and it is not selected.
    again = ("ablation.only=[base,no curriculum]",)
    assert ablation(*again) == 0
    out = capfd.readouterr().out
    assert out.count(": in out/small.json already") == 2
    assert rows_of(tmp_path) == [base, fixed, broken]

    # What a job of the sweep, or an ablation that was killed, left in the runs' folders.
    (tmp_path / "out/small.json").unlink()
    assert ablation(*again) == 0
    assert capfd.readouterr().out.count(": read from runs/small/") == 2
    assert rows_of(tmp_path) == [
        {k: v for k, v in row.items() if k != "wall_s"} for row in (base, fixed)
    ]

    # The measurements of another commit are neither mixed with these nor lost.
    text = (tmp_path / "out/small.json").read_text()
    (tmp_path / "out/small.json").write_text(text.replace('"commit": "abc"', '"commit": "def"'))
    assert ablation(*again) == 2
    assert "holds 2 rows of other settings or commits" in capfd.readouterr().err
    assert ablation(*again, "ablation.drop_others=true") == 0
    assert [row["commit"] for row in rows_of(tmp_path)] == ["abc", "abc"]


def check_against_its_folder(row: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "results.json").read_text())["config"]
    assert config["trainer"]["max_time"] == "01:00:00:00"
    assert config["seed"] == config["data"]["seed"] == row["seed"] == 7
    assert row["overrides"][: len(COMMON)] == COMMON
    assert row["commit"] == "abc"
    metrics = list(csv.DictReader((folder / "csv/metrics.csv").open()))
    losses = [line["train/loss"] for line in metrics if line["train/loss"]]
    assert row["final_train_loss"] == float(losses[-1])
    assert (row["steps"], row["tokens"]) == (len(losses), 8 * 512) == (8, 4096)
    first = {}
    for line in metrics:
        if line["train/context_length"]:
            first.setdefault(float(line["train/context_length"]), int(line["step"]))
    reached = {r["context_length_tokens"]: r["step"] for r in row["context_lengths"]}
    assert reached == first
    n, correct = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for cell in cells_of(read_samples(folder / "passkey")):
        if cell["depth"] >= 0:
            n[cell["task"], cell["length_tokens"]] += len(cell["answers"])
            correct[cell["task"], cell["length_tokens"]] += cell["correct"]
    assert row["passkey"] == [
        {
            "task": task,
            "length_tokens": length,
            "n": n[task, length],
            "correct": correct[task, length],
            "accuracy": correct[task, length] / n[task, length],
        }
        for task in ("multi_key", "single")
        for length in (512, 640)
    ]
    assert list(n.values()) == [8, 8, 8, 8]  # two depths, two fillers


def test_the_declared_variants_differ_from_the_base_in_one_thing() -> None:
    config, _ = compose_config("ablation", AblationConfig, [])
    assert config.ablation.seeds == [0, 1, 2]
    base, *others = plan_runs(replace(config.ablation, seeds=[2]))
    assert base.config.model.length_temperature == "ssmax"
    assert max(base.config.evaluation.lengths) == 2**20
    assert base.config.trainer.max_time == "00:00:01:40"
    changed = {}
    for run in others:
        its, base_s = flat(asdict(run.config)), flat(asdict(base.config))
        assert its.pop("run_id") == f"{run.folder.name}"
        changed[run.variant] = {k: v for k, v in its.items() if k not in base_s or base_s[k] != v}
    assert changed == {
        "no position skips": {"data.skip_probability": 0.0},
        "no length temperature": {"model.length_temperature": "none"},
        "length temperature llama4": {"model.length_temperature": "llama4"},
        "no curriculum": {"callbacks.context_length": None},
        "RoPE theta 1e4": {"model.rope_parameters.rope_theta": 1e4},
        "RoPE theta 1e8": {"model.rope_parameters.rope_theta": 1e8},
        "NoPE every other layer": {"model.nope_layers": [1, 3, 5]},
    }
    assert base.config.data.context_length == 16384


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return out


def test_a_line_of_the_sweep_is_the_run(
    ablation: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ablation("ablation.sweep_file=sweep.txt", "ablation.only=[no curriculum]") == 0
    assert "1 runs to do: sweep.txt" in capfd.readouterr().out
    (line,) = (tmp_path / "sweep.txt").read_text().splitlines()
    # As slurm/sweep.sbatch starts it.
    arguments = ["ckpt_path=auto", "run_id=12-1", *line.split()]
    config, _ = compose_config("fit", RunConfig, split_flags(arguments)[1])
    assert (config.name, config.run_id, config.seed) == ("small", "no-curriculum,seed=7", 7)
    assert config.callbacks.context_length is None
    assert config.evaluation.lengths == [512, 640]
    assert not (tmp_path / "runs").exists()


def row(variant: str, seed: int, *shares: float, seconds: float = 5.0, length: int = 1024) -> dict:
    return {
        "variant": variant,
        "seed": seed,
        "status": "measured",
        "context_lengths": [{"context_length_tokens": length, "step": 9, "elapsed_s": seconds}],
        "passkey": [
            {"task": task, "length_tokens": tokens, "n": 4, "correct": 4 * share, "accuracy": share}
            for task, share in zip(("single", "multi_key"), shares, strict=True)
            for tokens in (2**12, 2**20)
        ],
    }


def test_the_table_has_mean_and_range_over_seeds() -> None:
    rows = [
        row("a", 0, 1.0, 0.5, seconds=5.0),
        row("a", 1, 1.0, 0.75, seconds=8.0),
        row("b", 0, 0.25, 0.0),
        row("b", 1, 0.5, 0.0, length=512),
        {"variant": "b", "seed": 2, "status": "failed", "reason": "x"},
        {"variant": "c", "seed": 0, "status": "failed", "reason": "x"},
    ]
    heads, lines = ablation_cells(rows)
    assert heads == ["variant", "task", "seeds", "trained to", "after", "4k", "1M"]
    assert lines == [
        ["a", "single", "2", "1k", "6.5 (5-8) s", "100", "100"],
        ["a", "multi_key", "2", "1k", "6.5 (5-8) s", "62.5 (50-75)", "62.5 (50-75)"],
        ["b", "single", "2 of 3", "512-1k", "-", "37.5 (25-50)", "37.5 (25-50)"],
        ["b", "multi_key", "2 of 3", "512-1k", "-", "0", "0"],
    ]


def test_the_plot_has_a_marker_a_seed_and_a_bar_at_their_mean(
    tmp_path: Path, figures: list[Figure]
) -> None:
    rows = [row("a", 0, 1.0, 0.5), row("a", 1, 0.5, 0.25), row("b", 0, 0.25, 0.0)]
    draw_ablation(rows, tmp_path / "plot.png", None)
    (figure,) = figures
    single, multi = figure.axes
    assert [axes.get_ylabel().split("\n")[0] for axes in (single, multi)] == ["single", "multi_key"]
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    a, b = (handle.get_color() for handle in legend.legend_handles)
    for axes, expected in (
        (single, {a: ([100, 50], [75, 75]), b: ([25], [25, 25])}),
        (multi, {a: ([50, 25], [37.5, 37.5]), b: ([0], [0, 0])}),
    ):
        for place in (0, 1):  # of the two lengths
            here = [line for line in axes.lines if abs(line.get_xdata()[0] - place) < 0.5]
            for color, drawn in expected.items():
                lines = [list(line.get_ydata()) for line in here if line.get_color() == color]
                assert lines == [list(heights) for heights in drawn]
    assert [text.get_text() for text in multi.get_xticklabels()] == ["4,096", "1,048,576"]


def test_without_a_measured_row_there_is_no_plot(tmp_path: Path) -> None:
    draw_ablation([{"status": "failed", "variant": "a"}], tmp_path / "plot.png", 80)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_a_gpu_nothing_is_written(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ic("ablation") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ic: ablation, variant 'base': trainer.accelerator=gpu, but PyTorch sees no CUDA GPU here; "
        "add trainer.accelerator=cpu and trainer.precision=32-true to ablation.common"
    )
    assert not list(tmp_path.iterdir())


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f,9")
    assert visible_gpus() == ["3", "GPU-8f"]


A, B = AblationVariant("a"), AblationVariant("b", ["optimizer.lr=1e-3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": [A, AblationVariant("a")]}, "a: give each variant its own name"),
        (
            {"variants": [AblationVariant("base")], "only": ["bse"]},
            "unknown variant .* 'bse'; did you mean base",
        ),
        ({"max_time_s": 0}, "ablation.max_time_s=0: must be at least 1"),
        ({"run_timeout_s": 100.0}, "must be above ablation.max_time_s=100"),
        ({"seeds": [1, 1]}, r"ablation.seeds=\[1, 1\]: one or more, different"),
        ({"output": "x.csv"}, "must end in .json"),
        (
            {"common": ["trainer.max_time=00:00:01:00"]},
            "trainer.max_time comes from ablation.max_time_s",
        ),
        ({"variants": [AblationVariant("a", ["logger.csv=false"])]}, "the verb: logger.csv=true"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AblationOptions(**options)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "ablation.variants is empty"),
        ([A, AblationVariant("a2")], "variants 'a' and 'a2' are the same run"),
        ([A, AblationVariant("b", ["data.skip=0"])], "variant 'b': unknown key 'data.skip'"),
        (
            [A, AblationVariant("b", ["evaluation.samples=3"])],
            "'b': its evaluation is not that of 'a'",
        ),
    ],
)
def test_bad_plans(variants: list[AblationVariant], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_runs(AblationOptions(variants, seeds=[0]))


def test_equal_steps() -> None:
    shared = ["experiment=mla_tiny", "trainer.max_steps=7"]
    options = AblationOptions([A, B], seeds=[0], common=shared, max_time_s=None)
    trainers = [run.config.trainer for run in plan_runs(options)]
    assert [(t.max_steps, t.max_time) for t in trainers] == [(7, None), (7, None)]
    longer = AblationVariant("b", ["trainer.max_steps=8"])
    with pytest.raises(ValueError, match="'b': trainer.max_steps=8, but 'a' has 7"):
        plan_runs(AblationOptions([A, longer], seeds=[0], common=shared, max_time_s=None))


def test_training_share() -> None:
    rows = [{"steps": 1200}, {"status": "failed"}, {"steps": 1200}]
    assert training_share(rows, None) == "1,200 steps"
    assert training_share(rows, 80) == "80 s"
