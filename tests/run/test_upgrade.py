"""A run that an earlier version began continues with this one."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
ASSETS = Path(__file__).parent / "assets"
RUN = (
    "fit",
    "experiment=mla_tiny",
    "run_id=a4eee03",
    "trainer.max_steps=6",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=1",
    "model.num_hidden_layers=1",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_attention_heads=2",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
    "data.context_length=256",
    "data.tokens_per_batch=512",
    "optimizer.warmup_steps=2",
    "callbacks.checkpoint.every_n_steps=4",
    "callbacks.checkpoint.keep_every_n_steps=4",
    "callbacks.passkey=null",
    "logger.tensorboard=false",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The earlier version's run, stopped after step 4."""
    run = tmp_path / "runs/mla_tiny/a4eee03"
    shutil.copytree(ASSETS / "a4eee03", run, symlinks=True)
    return run


def losses(metrics: Path) -> dict[int, float]:
    rows = csv.DictReader(metrics.open())
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config))


def test_a_run_of_a4eee03_continues(ic: Run, folder: Path, capsys: Capture) -> None:
    """With the losses that a4eee03 itself went on with; to four digits, as the golden ones."""
    begun = losses(folder / "csv/metrics.csv")
    assert list(begun) == [0, 1, 2, 3]
    assert ic(*RUN, "ckpt_path=last") == 0
    told = capsys.readouterr().err
    assert f"continuing from {folder}/checkpoints/step=4" in told
    assert "of another version" not in told
    now, then = losses(folder / "csv/metrics.csv"), losses(ASSETS / "a4eee03-resumed.csv")
    assert list(now) == list(then) == [0, 1, 2, 3, 4, 5]
    assert {step: now[step] for step in begun} == begun
    assert [now[4], now[5]] == pytest.approx([then[4], then[5]], rel=2e-4)
    assert (folder / "checkpoints/last").resolve().name == "step=6"


def test_keys_that_came_later_or_are_gone(ic: Run, folder: Path, capsys: Capture) -> None:
    def as_in_another_version(config: dict[str, Any]) -> None:
        del config["objective"], config["trainer"]["detect_anomaly"], config["callbacks"]["memory"]
        del config["callbacks"]["guardrails"], config["data"]["task_weights"]["multi_query"]
        config["optimizer"]["nesterov"] = True

    edit_config(folder, as_in_another_version)
    assert ic(*RUN, "ckpt_path=last") == 0
    told = capsys.readouterr().err
    assert "this one has no optimizer.nesterov=True, and continues without" in told
    assert list(losses(folder / "csv/metrics.csv")) == [0, 1, 2, 3, 4, 5]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["objective"] == {"all_tokens_weight": 0.1, "indexer": "none"}
    assert "nesterov" not in written["optimizer"]


def test_a_changed_key_is_refused_by_name(ic: Run, folder: Path, capsys: Capture) -> None:
    def lacks_warmup(config: dict[str, Any]) -> None:
        del config["optimizer"]["warmup_steps"], config["trainer"]["gradient_clip_val"]

    edit_config(folder, lacks_warmup)
    before = (folder / "config.yaml").read_text()
    assert ic(*RUN, "ckpt_path=last", "optimizer.lr=0.5", "trainer.log_every_n_steps=2") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "optimizer.lr: 0.004 -> 0.5" in error
    # A key that the file lacks had its default, and 2 is another value.
    assert "optimizer.warmup_steps: 100 -> 2" in error
    assert "gradient_clip_val" not in error
    assert "log_every_n_steps" not in error
    assert "allow_config_change=true" in error
    assert (folder / "config.yaml").read_text() == before
