"""`run=FOLDER` is a run with its own configuration, `from=FOLDER` a new one with that."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import SHORT

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
RUN = (
    *SHORT,
    "model/adapter=lora",
    "model.num_hidden_layers=1",
    "model.rope_parameters={rope_type: yarn, rope_theta: 10000.0, factor: 4.0, "
    "original_max_position_embeddings: 1024}",
    "optimizer=adamw",
    "optimizer.lr=0.003",
    "evaluation=long",
    "evaluation.lengths=[256]",
    "callbacks.memory=null",
    "callbacks.passkey.at_end=false",
    "trainer.max_steps=2",
    "overwrite=false",
)


def saved(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def shown(ic: Run, capsys: Capture, *args: str) -> dict[str, Any]:
    """The configuration that a command would run with."""
    capsys.readouterr()
    assert ic(*args, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.slow
def test_a_run_by_its_folder(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    assert ic(*RUN) == 0
    run = tmp_path / "runs/debug/default"
    before = saved(run)
    of_the_start = {"ckpt_path": "last", "overwrite": False, "allow_config_change": False}
    same = {**before, **of_the_start, "output_dir": str(tmp_path / "runs")}
    for verb in ("fit", "validate", "test", "predict"):
        assert shown(ic, capsys, verb, "run=runs/debug/default") == same

    # Moved, since the folder says which run it is.
    moved = tmp_path / "elsewhere/group/mine"
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    assert ic("fit", "run=elsewhere/group/mine") == 0
    assert "2 of 2 steps are done" in capsys.readouterr().err
    assert saved(moved) == before
    assert ic("fit", "run=elsewhere/group/mine", "optimizer.lr=0.002", "model.adapter=null") == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.003 -> 0.002; " in error or "; optimizer.lr: 0.003 -> 0.002" in error
    assert "model.adapter: {" in error
    assert "keys} -> null" in error
    longer = ("trainer.max_steps=3", "allow_config_change=true")
    assert ic("fit", "run=elsewhere/group/mine", *longer) == 0
    rows = csv.DictReader((moved / "csv/metrics.csv").open())
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [0, 1, 2]
    capsys.readouterr()

    # What the other verbs measured is saved, with the checkpoint that it is of.
    assert ic("validate", "run=elsewhere/group/mine") == 0
    file = moved / "validate/step=3.json"
    assert f"results: {file}" in capsys.readouterr().out
    results = json.loads(file.read_text())
    assert results["config"]["model"]["init_from"] == str(moved / "checkpoints/step=3")
    values = {row["metric"]: row["value"] for row in results["rows"]}
    assert set(values) == {"val/loss", "val/answer_accuracy"}
    assert ic("predict", "run=elsewhere/group/mine", "ckpt_path=last") == 0
    (row,) = json.loads((moved / "predict/step=3.json").read_text())["rows"]
    answers = (moved / "predictions.jsonl").read_text().splitlines()
    assert row["n"] == len(answers) > 0
    right = sum(json.loads(line)["correct"] for line in answers)
    assert row["mean_correct"] == right / row["n"]


@pytest.mark.slow
def test_a_new_run_from_the_configuration_of_one(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    config = {**shown(ic, capsys, *RUN), "gone": 1, "overwrite": True}
    config["optimizer"]["also_gone"] = 2
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    del config["gone"], config["optimizer"]["also_gone"]

    given = ("fit", "from=old", "run_id=new")
    assert shown(ic, capsys, *given) == {**config, "run_id": "new", "overwrite": False}
    changed = shown(ic, capsys, *given, "optimizer=muon", "model.adapter=null", "seed=3")
    assert changed["optimizer"]["name"] == "muon"
    assert changed["optimizer"]["lr"] != config["optimizer"]["lr"]
    assert changed["model"] == {**config["model"], "adapter": None}
    assert changed["seed"] == 3
    assert changed["data"] == config["data"]
    capsys.readouterr()
    assert ic(*given, "--print_config") == 0
    said = capsys.readouterr().err
    assert "from=old: this version has no gone: left out" in said
    assert "from=old: this version has no optimizer.also_gone: left out" in said


@pytest.mark.slow
def test_a_folder_of_any_name(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    assert ic(*RUN, "output_dir=plain") == 0
    odd = tmp_path / "it's \\ a, b=c [x] (y) {z} 'q' \"r\""
    (tmp_path / "plain").rename(odd)
    run = odd / "debug/default"
    capsys.readouterr()

    assert ic("fit", f"run={run}") == 0
    assert "2 of 2 steps are done" in capsys.readouterr().err
    assert ic("validate", f"run={run}") == 0
    assert (run / "validate/step=2.json").is_file()
    assert shown(ic, capsys, "fit", f"from={run}", "run_id=new")["run_id"] == "new"
    short = ("evaluation.lengths=[256]", "evaluation.depths=[0]", "evaluation.samples=1")
    assert ic("evaluate", f"run={run}", *short) == 0
    assert (run / "evaluate/step=2/passkey/samples.jsonl").is_file()
    assert ic("generate", f"checkpoint={run}", "prompt=hi", "max_new_tokens=1") == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("fit", "from=old"), "give it a run_id="),
        (("fit", "from=old", "run_id=a", "run=old"), "from=old and run=old: give one of the two"),
        (("fit", "run=old", "run_id=a"), "run_id=a: run=old says which run it is"),
        (("validate", "run=old", "experiment=mla_tiny"), "experiment=mla_tiny: run=old says"),
        (("test", "run=nowhere"), "run=.*nowhere: no run has written .*nowhere/config.yaml"),
        (("validate", "from=old"), "unknown key 'from'"),
        (("validate", "experiment=mla_tiny"), "ckpt_path: say which checkpoint, .* or run=FOLDER"),
    ],
)
def test_refuses(
    ic: Run, capsys: Capture, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("data: {name: passkey}\n")
    assert ic(*args) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_override_beside_run_stays_and_hides_every_bar(
    ic: Run, capsys: Capture, tmp_path: Path
) -> None:
    """As docs/checkpoints.md says; without our progress there is no bar of Lightning's either."""
    quick = ("callbacks.memory=null", "callbacks.passkey=null", "trainer.max_steps=1")
    assert ic(*SHORT, *quick) == 0
    capsys.readouterr()
    run = tmp_path / "runs/debug/default"
    more = ("trainer.max_steps=2", "allow_config_change=true")
    assert ic("fit", "run=runs/debug/default", "callbacks.progress=false", *more) == 0
    said = "".join(capsys.readouterr())
    assert "it/s" not in said
    assert "step 2/2" not in said
    assert saved(run)["callbacks"]["progress"] is False
    assert ic("validate", "run=runs/debug/default") == 0
    assert "it/s" not in "".join(capsys.readouterr())
    resumed = shown(ic, capsys, "fit", "run=runs/debug/default")
    assert resumed["callbacks"]["progress"] is False


@pytest.mark.parametrize("data", ["text", "sft", "preference"])
@pytest.mark.parametrize("setting", ["train_files", "val_files"])
def test_a_missing_file_is_refused_before_anything_is_written(
    ic: Run, capsys: Capture, tmp_path: Path, data: str, setting: str
) -> None:
    (tmp_path / "here.jsonl").write_text('{"text": "a"}\n')
    files = {"train_files": "here.jsonl", "val_files": "here.jsonl", setting: "gone.jsonl"}
    named = [f"data.{name}=[{file}]" for name, file in files.items()]
    objective = ["preference=dpo"] if data == "preference" else []
    assert ic("fit", f"data={data}", "name=x", *objective, *named) == 2
    said = capsys.readouterr().err
    assert f"data.{setting}: there is no file 'gone.jsonl'" in said
    assert "run in " not in said
    assert [path.name for path in tmp_path.iterdir()] == ["here.jsonl"]
