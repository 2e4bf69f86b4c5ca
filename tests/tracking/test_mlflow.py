"""A real MLflow server: runs that are killed, a server that is down, and the registry."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ic.files.run_folder import RunFolder
from ic.tracking.csv_logger import read_metrics
from ic.tracking.identity import saved_identity
from ic.tracking.mlflow_logger import RUN_TAG
from ic.tracking.registry import registered_folder
from ic.tracking.spool import TOKENS, SpoolFolder
from ic.training.language_modeling import LanguageModelingModule
from tests.conftest import SHORT
from tests.run.killed import kill_in, run_and_die
from tests.serving.served import NAME, greedy, served
from tests.tracking.mlflow_server import MLflowServer

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.tracking, pytest.mark.usefixtures("mlflow_environment")]

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
STEPS = 8
RUN = (
    *SHORT,
    "logger=mlflow",
    "callbacks.checkpoint={every_n_steps: 2, monitor: null}",
    "trainer.val_check_interval=2",
    "evaluation.lengths=[256]",
    "evaluation.depths=[0.5]",
    f"trainer.max_steps={STEPS}",
    "overwrite=false",
)


def kill_in_step(step: int) -> None:
    kill_in(
        LanguageModelingModule, "training_step", lambda module: module.trainer.global_step == step
    )


def logged(folder: RunFolder, metric: str) -> list[tuple[int, float]]:
    rows = read_metrics(folder.metrics)
    return [(int(row["step"]), float(row[metric])) for row in rows if metric in row]


def only_run(server: MLflowServer, folder: RunFolder) -> Any:
    """The run of a folder on the server; that there is one alone."""
    client = mlflow.MlflowClient(server.uri)
    who = saved_identity(folder)
    assert who is not None
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{who.key}'")
    return run


def history(server: MLflowServer, run: Any, metric: str) -> list[tuple[int, float]]:
    """In the order of the steps; a step that is there twice is twice in it."""
    found = mlflow.MlflowClient(server.uri).get_metric_history(run.info.run_id, metric)
    return sorted((each.step, each.value) for each in found)


def test_no_step_is_lost_and_none_is_there_twice(
    ic: Run, server: MLflowServer, tmp_path: Path, capsys: Capture
) -> None:
    """The training is killed in step 5, the server while it is continued, and both come back."""
    folder = RunFolder(tmp_path / "runs/debug/default")
    run_and_die(tmp_path, RUN, kill_in_step, 5)
    assert folder.last.resolve().name == "step=4"

    server.kill()
    with pytest.warns(UserWarning, match="MLflow has not been told everything"):
        assert ic(*RUN, "ckpt_path=last") == 0  # training ends all the same
    spool = SpoolFolder(folder, "mlflow")
    assert ic("sync", "runs/debug/default") == 2
    assert "MLflow does not take what the run has kept for it" in capsys.readouterr().err
    server.start()
    more = ("ckpt_path=last", f"trainer.max_steps={STEPS + 2}", "allow_config_change=true")
    assert ic(*RUN, *more) == 0
    assert ic("sync", "runs/debug/default") == 0
    assert "MLflow: nothing was left to send" in capsys.readouterr().out
    assert not spool.rejected.exists()

    run = only_run(server, folder)
    losses = logged(folder, "train/loss")
    assert [step for step, _ in losses] == list(range(STEPS + 2))
    assert history(server, run, "train/loss") == losses
    assert history(server, run, "val/loss") == logged(folder, "val/loss")
    tokens = dict(history(server, run, TOKENS))
    # After so many steps; the evaluation behind the last step of the first two starts told it first.
    assert [tokens[step] for step in range(STEPS)] == [512.0 * (n + 1) for n in range(STEPS)]
    assert [tokens[step] for step in (STEPS, STEPS + 1)] == [512.0 * STEPS, 512.0 * (STEPS + 2)]
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.max_steps"] == str(STEPS)
    assert run.data.tags["changed.trainer.max_steps"] == f"{STEPS} -> {STEPS + 2}"
    assert run.data.params["model.hidden_size"]
    client = mlflow.MlflowClient(server.uri)
    names = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "environment.json", "passkey", "run"} <= names
    pictures = {each.path for each in client.list_artifacts(run.info.run_id, "passkey/heatmap")}
    assert f"passkey/heatmap/step={STEPS}.png" in pictures


def test_the_registry(
    ic: Run, server: MLflowServer, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, register, promote past a gate, serve by alias, compare, roll back; and refusals."""
    for seed in (0, 1):
        one = (
            f"seed={seed}",
            f"run_id={seed}",
            "trainer.max_steps=2",
            "logger.mlflow.mode=offline",
        )
        assert ic(*RUN, *one) == 0
    register = ("register", "name=tiny")
    assert ic(*register, "run=runs/debug/0") == 0
    assert "models:/tiny/1, tiny@candidate" in capsys.readouterr().out

    def refused(*args: str) -> str:
        registered_folder.cache_clear()
        assert ic(*args) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ic: ")]
        return line

    gate = ("promote", "name=tiny", "judged_by=passkey")
    assert "not promoted: models:/tiny/1: passkey 0.000 of 2 answers" in refused(
        *gate, "at_least=0.5"
    )
    assert "tiny has no champion to be compared with" in refused(
        "promote", "name=tiny", "compare=true"
    )
    ask = ("generate", "prompt=hello", "accelerator=cpu")
    assert "no alias 'champion'; it has candidate (1)" in refused(
        *ask, "checkpoint=models:/tiny@champion"
    )
    assert ic(*gate, "at_least=0.0") == 0
    assert "models:/tiny/1 is the champion" in capsys.readouterr().out
    assert "there is none to go back to" in refused("promote", "name=tiny", "roll_back=true")

    def answers() -> tuple[str, list[int]]:
        """What the engine serves at the alias, and the weights' own answer to it."""
        registered_folder.cache_clear()
        folder = registered_folder("models:/tiny@champion")
        with served(Path("models:/tiny@champion")) as found:
            prompt = list(b"The pass key is")
            body = {"model": NAME, "prompt": prompt, "max_tokens": 6, "temperature": 0}
            answer = found.http.post("/v1/completions", json=body).json()
        expected = greedy(folder, prompt, 6)
        assert answer["choices"][0]["text"] == bytes(t for t in expected if t < 256).decode(
            errors="replace"
        )
        return folder.name, expected

    assert answers()[0] == "tiny-v1"
    assert ic(*register, "run=runs/debug/1") == 0
    assert ic("promote", "name=tiny", "compare=true") == 0
    assert "models:/tiny/2 is the champion, in place of version 1" in capsys.readouterr().out
    assert answers()[0] == "tiny-v2"
    assert "is the champion already" in refused(*gate, "at_least=0.0")
    assert ic("promote", "name=tiny", "roll_back=true") == 0
    assert "models:/tiny/1 is the champion again" in capsys.readouterr().out
    assert answers()[0] == "tiny-v1"

    # Each verb that loads a source takes the form; what cannot be had is one line.
    assert ic("export", "checkpoint=models:/tiny/2", "output=there") == 0
    assert (tmp_path / "there/README.md").is_file()
    assert "there is no such version" in refused(*ask, "checkpoint=models:/tiny/9")
    assert "has no model 'tinny'; did you mean tiny?" in refused(*ask, "checkpoint=models:/tinny/1")
    assert "write models:/NAME@ALIAS or models:/NAME/VERSION" in refused(
        *ask, "checkpoint=models:/tiny"
    )
    client = mlflow.MlflowClient(server.uri)
    run = client.create_run(client.create_experiment("elsewhere"))
    client.create_registered_model("foreign")
    client.create_model_version("foreign", run.info.artifact_uri, run.info.run_id)
    assert "models:/foreign/1 is unsigned" in refused(*ask, "checkpoint=models:/foreign/1")
    shutil.copytree("there", "bare")
    Path("bare/README.md").unlink()
    assert "is unsigned: it has no model card" in refused(*register, "source=bare")
    kept = registered_folder("models:/tiny/2")
    shutil.rmtree(kept)
    (weights,) = (server.data / "artifacts").rglob(f"{_digest(client)[:16]}/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors differs from what was registered" in refused(
        *ask, "checkpoint=models:/tiny/2"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "the registry at http://127.0.0.1:9 does not do it" in refused(
        *ask, "checkpoint=models:/tiny/1"
    )


def _digest(client: Any) -> str:
    return str(client.get_model_version("tiny", "2").tags["ic.sha256"])
