"""What numbers a configuration takes, and what the run will have logged by the first validation."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from ic.cli import find_verbs
from ic.config.compose import compose_config
from ic.config.numbers import LARGEST
from ic.config.run import RunConfig
from ic.training.metrics import BucketMeans
from ic.training.options import PreferenceOptions
from tests.config.schema import walk


def refused(override: str, complaint: str, *more: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        compose_config("fit", RunConfig, [*more, override])


@pytest.mark.parametrize(
    "key",
    [
        "trainer.gradient_clip_val",
        "callbacks.watchdog.timeout_s",
        "callbacks.requeue.margin_s",
        "optimizer.lr",
        "optimizer.weight_decay",
        "model.rms_norm_eps",
        "model.length_temperature_beta",
        "objective.all_tokens_weight",
        "callbacks.guardrails.loss_threshold",
        "model.rope_parameters.rope_theta",
        "data.task_weights.single",
    ],
)
def test_no_number_is_infinite(key: str) -> None:
    for value in ("inf", "nan", "-inf", "1e999"):
        written = value.replace("1e999", "inf")
        refused(f"{key}={value}", f"{key}={written}: must be a finite number")
    refused("optimizer.betas=[nan,0.9]", "optimizer.betas=nan: must be a finite number")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("trainer.max_steps=99999999999999999999", "trainer.max_steps=99999999999999999999: must"),
        (f"trainer.max_steps={'9' * 60}", "99999999999999999999...9999 (60 digits): must be at"),
        ("seed=5000000000", "seed=5000000000: must be at most 4294967295"),
        ("callbacks.watchdog.timeout_s=1e300", "timeout_s=1e+300: must be at most 1000000000"),
        ("data.num_workers=100000", "data.num_workers=100000: must be at most 1024"),
        ("evaluation.lengths=[512,99999999999]", "evaluation.lengths=99999999999: must be at most"),
        ("model.rms_norm_eps=-1", "rms_norm_eps=-1.0: must be above 0 and at most 1"),
        ("model.absorbed_max_queries=-1", "absorbed_max_queries=-1: must be at least 0"),
        ("evaluation.lengths=[512,512]", "evaluation.lengths=[512, 512]: give each one once"),
        ("callbacks.passkey.cheap_lengths=[512,512]", "cheap_lengths=[512, 512]: give each one"),
        ("evaluation.tasks=[single,single]", "give each one once"),
        ("evaluation.fillers=[noise,noise]", "give each one once"),
        ("evaluation.fillers_by_length={512: [noise, noise]}", "give each one once"),
    ],
)
def test_a_number_beyond_its_field_is_refused(override: str, complaint: str) -> None:
    refused(override, complaint)


def test_every_bound_is_some_fields() -> None:
    keys = {key for verb in find_verbs().values() for key, _ in walk(verb.module.Config)}
    unused = [name for name in LARGEST if not any(fnmatchcase(key, name) for key in keys)]
    assert unused == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "logged"),
    [
        (["data=passkey"], ["val/loss", "val/answer_accuracy"]),
        (
            ["data=text", "callbacks.context_length=null"],
            ["val/loss", "val/perplexity", "val/bits_per_byte"],
        ),
        (["data=sft", "callbacks.context_length=null"], ["val/loss", "val/perplexity"]),
        (["data=preference", "preference=dpo", "callbacks.context_length=null"], None),
    ],
)
def test_best_is_decided_by_what_is_logged(data: list[str], logged: list[str] | None) -> None:
    config, _ = compose_config("fit", RunConfig, data)
    if logged is None:  # what the module's means give
        options = PreferenceOptions()
        means = BucketMeans(options.length_buckets)
        logged = [f"val/{name}{label}" for label in means.labels for name in means.NAMES]
    assert config.validation_metrics == logged
    for name in logged:
        compose_config("fit", RunConfig, [*data, f"callbacks.checkpoint.monitor={name}"])
    for name in ("nope", "train/loss", ""):
        refused(
            f"callbacks.checkpoint.monitor={name}",
            f"monitor={name!r}: "
            + ("did you mean val/loss? " if name == "train/loss" else "")
            + "the validation logs val/loss",
            *data,
        )


@pytest.mark.slow
@pytest.mark.parametrize("data", ["text", "sft"])
def test_the_validation_logs_what_it_says(
    ic: Callable[..., int], tmp_path: Path, data: str
) -> None:
    (tmp_path / "a.txt").write_text("one line of text\n" * 99)
    (tmp_path / "b.txt").write_text("another line of text\n" * 20)
    files = {"text": "{}.txt", "sft": "bundled:conversations-{}.jsonl"}[data]
    names = ("a", "b") if data == "text" else ("train", "val")
    train, val = (files.format(name) for name in names)
    given = (f"data={data}", f"data.train_files={train}", f"data.val_files={val}")
    short = ("data.context_length=512", "data.tokens_per_batch=512", "trainer.max_steps=1")
    off = ("callbacks.context_length=null", "callbacks.memory=null", "callbacks.passkey=null")
    assert ic("fit", "debug=default", *given, *short, *off) == 0
    (metrics,) = tmp_path.rglob("metrics.csv")
    header = metrics.read_text().partition("\n")[0].split(",")
    config, _ = compose_config("fit", RunConfig, [*given, off[0]])
    logged = [name for name in header if name.startswith("val/")]
    assert sorted(logged) == sorted(config.validation_metrics)
