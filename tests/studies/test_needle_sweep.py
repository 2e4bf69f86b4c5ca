"""The verb needle_sweep: its runs are the published ones; real runs of a tiny one, and again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ic.datamodules.needle_pairs import needle_pairs, write_pairs
from ic.datamodules.needle_pairs_options import MakePreferencesOptions
from ic.model.byte_tokenizer import ByteTokenizer
from ic.studies.needle_sweep import plan_sweep
from ic.studies.needle_sweep_options import NeedleSweepConfig

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_published_comparison(stage: str) -> None:
    published = json.loads((RESULTS / f"needle-sweep-{stage}.json").read_text())["config"]
    plan = plan_sweep(NeedleSweepConfig(scale="cpu", jobs=2, output_dir="out"))
    comparison = {"sft": plan.compare_sft, "dpo": plan.compare_dpo}[stage]
    assert comparison is not None
    assert asdict(comparison) == published


def changes(options: MakePreferencesOptions) -> dict[str, Any]:
    """What differs from a set of the same lengths and tokens with nothing set."""
    plain = asdict(MakePreferencesOptions(options.output))
    return {k: v for k, v in asdict(options).items() if v != plain[k] and k != "lengths"}


def test_the_sets_have_as_many_tokens() -> None:
    sets = plan_sweep(NeedleSweepConfig(scale="gpu")).sets
    tokens = {"tokens_per_length": 900_000}
    no_distractor = {"near_miss": 1.0, "refusal": 1.0}
    assert {name: changes(options) for name, options in sets.items()} == {
        "base": tokens,
        "no-distractors": tokens | {"num_distractors": 0, "rejected": no_distractor},
        "32-distractors": {"tokens_per_length": 1_200_000, "num_distractors": 32},
        "short": {"tokens_per_length": 1_800_000},
        "long": {"tokens_per_length": 3_600_000},
        "middle": tokens | {"depths": [0.4, 0.5, 0.6]},
        "random-words": tokens | {"filler": "random"},
        "distractor": tokens | {"rejected": {"distractor": 1.0}},
        "near-miss": tokens | {"rejected": {"near_miss": 1.0}},
        "refusal": tokens | {"rejected": {"refusal": 1.0}},
        "val": {"split": "validation", "samples": 2},
    }
    lengths = {name: options.lengths for name, options in sets.items()}
    for name, expected in {
        "short": [512, 1024],
        "long": [16384],
        "32-distractors": [1536, 4096, 16384],
        "val": [2048, 8192],
    }.items():
        assert lengths.pop(name) == expected
    assert set(map(tuple, lengths.values())) == {(512, 1024, 4096, 16384)}


def test_each_stage_starts_from_the_model_before() -> None:
    plan = plan_sweep(NeedleSweepConfig(overrides=["trainer.precision=32-true"], output_dir="out"))
    assert plan.base.overrides == [
        "experiment=mla_small",
        "output_dir=out",
        "run_id=base",
        "overwrite=true",
        "callbacks.passkey.at_end=false",
        "trainer.precision=32-true",
    ]
    assert plan.sft.run.path == Path("out/sft_32k/sft")
    for overrides, start in (
        (plan.sft.overrides, "out/mla_small/base"),
        (plan.compare_sft.common, "out/mla_small/base"),
        (plan.compare_dpo.common, "out/sft_32k/sft"),
    ):
        assert f"model.init_from={start}/checkpoints/last" in overrides
        assert overrides[-1] == "trainer.precision=32-true"


SHRINK = (
    "trainer.max_steps=1",
    "trainer.limit_val_batches=1",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=1",
    "evaluation.lengths=[512]",
    "evaluation.depths=[0.5]",
    "evaluation.samples=1",
    "callbacks.memory=null",
)


@pytest.mark.slow
def test_a_sweep_and_the_same_again(
    ic: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("IC_COMMIT", "abc")
    quoted = ",".join(f"'{override}'" for override in SHRINK)
    args = ("needle_sweep", "scale=cpu", "only=[near-miss,short]", "seeds=[3]")
    args = (*args, f"overrides=[{quoted}]", "run_timeout_s=86400", "output_dir=out")
    # Small sets that an earlier sweep might have written; the one for validation is missing.
    for name, options in plan_sweep(NeedleSweepConfig("cpu", output_dir="out")).sets.items():
        if name in ("base", "near-miss", "short"):
            small = replace(options, tokens_per_length=None, samples=1)
            write_pairs(needle_pairs(small, ByteTokenizer()), Path(small.output))
    assert ic(*args) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.jsonl")} == {
        "base",
        "val",
        "near-miss",
        "short",
    }
    for stage, name, start in (
        ("sft", "short", "mla_tiny/base"),
        ("dpo", "near-miss", "sft_32k/sft"),
    ):
        results = json.loads((tmp_path / f"out/{stage}.json").read_text())
        (row,) = results["rows"]
        assert (row["variant"], row["seed"], row["status"], row["steps"]) == (
            name,
            3,
            "measured",
            1,
        )
        run = json.loads((tmp_path / f"out/runs/{stage}/{name},seed=3/results.json").read_text())
        assert run["config"]["model"]["init_from"] == f"out/{start}/checkpoints/last"
        assert run["config"]["data"]["train_files"] == [f"out/{name}.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    capfd.readouterr()
    assert ic(*args) == 0
    said = "".join(capfd.readouterr())
    assert said.count(": finished, see") == 2
    assert said.count(" already") == 4 + 2  # the sets, and a row of each results file
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert {path.name for path in again if again[path] != before.get(path)} <= {
        f"{stage}.{kind}" for stage in ("sft", "dpo") for kind in ("json", "png")
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scale=tpu", "scale='tpu': did you mean"),
        ("only=[shrt]", "unknown set in only 'shrt'; did you mean short"),
        ("overrides=['trainer.max_step=1']", "unknown key 'trainer.max_step'"),
        ("overrides=['seed=1']", "comes from ablation.seeds"),
    ],
)
def test_bad_settings_before_anything_is_written(
    ic: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    assert ic("needle_sweep", "scale=cpu", override) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
