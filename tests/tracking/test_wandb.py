"""W&B: the starts of a run are one run, and a step that is taken again is there once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ic.files.run_folder import RunFolder
from ic.tracking.csv_logger import read_metrics
from ic.tracking.identity import saved_identity
from ic.tracking.spool import STEP, TOKENS, SpoolFolder
from ic.training.language_modeling import LanguageModelingModule
from tests.conftest import SHORT
from tests.run.killed import kill_in, run_and_die
from tests.tracking.wandb_server import wandb_server

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.tracking

Run = Callable[..., int]
RUN = (
    *SHORT,
    "logger=wandb",
    "callbacks.passkey=null",
    "callbacks.checkpoint={every_n_steps: 2, monitor: null}",
    "trainer.val_check_interval=2",
    "trainer.max_steps=6",
    "overwrite=false",
)
KEY = "a" * 40


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    """W&B's client reads its environment once in a process: the next test has a server of its own."""
    yield
    wandb.teardown()


def kill_in_step(step: int) -> None:
    kill_in(
        LanguageModelingModule, "training_step", lambda module: module.trainer.global_step == step
    )


@pytest.mark.parametrize("between", [False, True], ids=["sent once", "sent between the starts"])
def test_a_killed_run_is_one_run_when_it_is_sent(
    ic: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    between: bool,
) -> None:
    """Killed in step 5, so that steps 4 and 5 are taken again from the checkpoint of step 4; `sync`
    sends by W&B's own client to a stand-in of its server, after both starts or after each.
    """
    run_and_die(tmp_path, RUN, kill_in_step, 5)
    folder = RunFolder(tmp_path / "runs/debug/default")
    assert folder.last.resolve().name == "step=4"
    who = saved_identity(folder)
    assert who is not None
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        if between:
            assert ic("sync", "runs/debug/default") == 0
            sent = [row[STEP] for row in server.history(who.wandb_id) if "train/loss" in row]
            assert sent == [0, 1, 2, 3, 4]  # of step 5 nothing was logged
        assert ic(*RUN, "ckpt_path=last") == 0
        assert not list(tmp_path.rglob("offline-run-*"))  # W&B's own pieces
        assert ic("sync", "runs/debug/default") == 0
        assert re.search(r"W&B: [\d,]+ bytes sent", capfd.readouterr().out)
        (run,) = server.streams
        history = server.history(run)
        assert ic("sync", "runs/debug/default") == 0
        assert "W&B: nothing was left to send" in capfd.readouterr().out
        assert server.history(run) == history
    assert run == who.wandb_id
    logged = [
        (int(row["step"]), float(row["train/loss"]))
        for row in read_metrics(folder.metrics)
        if "train/loss" in row
    ]
    assert [step for step, _ in logged] == [0, 1, 2, 3, 4, 5]
    assert [(row[STEP], row["train/loss"]) for row in history if "train/loss" in row] == logged
    tokens = [row[TOKENS] for row in history if "train/loss" in row]
    assert tokens == [512 * (step + 1) for step in range(6)]
    validations = [row[STEP] for row in history if "val/loss" in row]
    assert validations == sorted(set(validations))
    assert len(validations) == 3
    config = server.configs[run]
    metrics = config["_wandb"]["value"]["m"]
    names = {number: name["1"] for number, name in enumerate(metrics, 1) if "1" in name}
    (everything,) = [each for each in metrics if each.get("2") == "*"]
    assert names[everything["5"]] == TOKENS  # the x axis
    assert (
        config["model"]["value"]["hidden_size"]
        == yaml.safe_load(folder.config.read_text())["model"]["hidden_size"]
    )
    assert config["start"]["value"]["versions"]["python"]
    assert {"environment.json"} <= {os.path.basename(name) for name in server.uploaded}


def test_a_server_that_does_not_answer(
    ic: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An online start goes offline, and training to its end; `sync` says that it cannot send."""
    monkeypatch.setattr("ic.tracking.wandb_logger._INIT_S", 1.0)
    monkeypatch.setattr("ic.tracking.tracker._CLOSE_S", 10.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    with pytest.warns(UserWarning, match="W&B has not been told everything"):
        assert ic(*RUN, "logger.wandb.mode=online", "trainer.max_steps=1") == 0
    folder = RunFolder(tmp_path / "runs/debug/default")
    assert SpoolFolder(folder, "wandb").size
    assert ic("sync", "runs/debug/default") == 2
    assert "W&B does not take what the run has kept for it" in capsys.readouterr().err
