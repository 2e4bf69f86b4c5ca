"""What waits for a tracking server survives a kill, and reaches it in order and once."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ic.files.json_lines import read_rows
from ic.files.run_folder import RunFolder
from ic.tracking import spool as spool_module
from ic.tracking.identity import identify, saved_identity
from ic.tracking.mlflow_sender import Delivered, MLflowSender
from ic.tracking.parameters import LONG, as_parameters
from ic.tracking.provenance import flatten
from ic.tracking.spool import TOKENS, Spool, SpoolFolder, read_messages

pytest.importorskip("mlflow")
from mlflow.exceptions import MlflowException


class Server:
    """What an MLflow server keeps; `ill` says what becomes of each request.

    `lost`: the request arrives and its answer does not; `down`: neither; `refused`: status 400.
    """

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int, float]] = []
        self.tags: dict[str, str] = {}
        self.ill: Iterator[str] = iter(())
        self.requests = 0

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self.requests += 1
        what = next(self.ill, "well")
        if what == "down":
            raise MlflowException("connection refused")
        if what == "refused" or any(metric.key == "bad" for metric in metrics):
            raise MlflowException.invalid_parameter_value("no such value")
        self.metrics += [(metric.key, metric.step, metric.value) for metric in metrics]
        self.tags |= {tag.key: tag.value for tag in tags}
        if what == "lost":
            raise MlflowException("read timed out")

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step) for k, step, _ in self.metrics if k == key]


@pytest.fixture
def folder(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(RunFolder(tmp_path), "mlflow")


def sender(folder: SpoolFolder, server: Server) -> MLflowSender:
    """As a process that starts makes it."""
    delivered = Delivered.read(folder, "http://there", "e")
    return MLflowSender(folder, delivered, lambda run_id: (server, run_id or "r"))


def send_all(one: MLflowSender) -> None:
    while True:
        try:
            if not one.send_some():
                return
        except MlflowException:
            continue


def test_steps_that_are_taken_again(folder: SpoolFolder) -> None:
    """Killed in step 5 and resumed from step 3; validations and tokens have their own steps."""
    first = Spool(folder)
    for step in range(5):
        first.log_metrics({"loss": 10.0 + step, TOKENS: 100.0 * (step + 1)}, step)
    first.log_metrics({"val": 1.0, TOKENS: 500.0}, 4)
    again = Spool(folder)
    for step in range(3, 7):
        again.log_metrics({"loss": 20.0 + step, TOKENS: 100.0 * (step + 1)}, step)
    again.log_metrics({"val": 2.0}, 4)
    again.log_metrics({"val": 3.0}, 6)
    rows = read_rows(folder.messages)
    assert [(r["step"], r["values"]["loss"]) for r in rows if "loss" in r["values"]] == [
        (0, 10.0), (1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 25.0), (6, 26.0),
    ]  # fmt: skip
    assert [(r["step"], r["values"]["val"]) for r in rows if "val" in r["values"]] == [
        (4, 1.0),
        (6, 3.0),
    ]
    assert [r["step"] for r in rows if TOKENS in r["values"]] == list(range(7))


def test_a_line_that_was_cut_short(folder: SpoolFolder) -> None:
    Spool(folder).log_metrics({"loss": 1.0}, 0)
    with folder.messages.open("ab") as lines:
        lines.write(b'{"kind": "metr')
    assert len(list(read_messages(folder.messages, 0))) == 1
    Spool(folder).log_metrics({"loss": 2.0}, 1)
    assert [message["step"] for message, _ in read_messages(folder.messages, 0)] == [0, 1]


def test_a_full_disk_loses_nothing(folder: SpoolFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(folder)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "append_rows", full)
        for step in (0, 1):
            with pytest.raises(OSError, match="No space"):
                spool.log_metrics({"loss": 1.0}, step)
    spool.log_metrics({"loss": 1.0}, 2)
    assert [message["step"] for message, _ in read_messages(folder.messages, 0)] == [0, 1, 2]


@pytest.mark.parametrize(
    "ill", [("lost",), ("down", "down", "lost", "down", "lost"), ("lost",) * 9]
)
def test_an_answer_that_is_lost(folder: SpoolFolder, ill: tuple[str, ...]) -> None:
    """The request has arrived; it is not sent again."""
    spool, server = Spool(folder), Server()
    for step in range(500):
        spool.log_metrics({"loss": float(step), "lr": 0.1}, step)
    server.ill = iter(ill)
    send_all(sender(folder, server))
    assert [step for key, step, _ in server.metrics if key == "loss"] == list(range(500))
    assert [step for key, step, _ in server.metrics if key == "lr"] == list(range(500))


def test_a_process_that_was_killed_before_it_noted_what_it_sent(folder: SpoolFolder) -> None:
    spool, server = Spool(folder), Server()
    for step in range(300):
        spool.log_metrics({"loss": float(step)}, step)
    one = sender(folder, server)
    assert one.send_some()
    noted = folder.sent.read_text()
    assert one.send_some()
    folder.sent.write_text(noted)  # as the first request left it
    send_all(sender(folder, server))
    assert [step for _, step, _ in server.metrics] == list(range(300))


def test_what_the_server_refuses_is_set_aside(folder: SpoolFolder) -> None:
    spool, server = Spool(folder), Server()
    for key in ("good", "bad", "fine"):
        spool.log_metrics({key: 1.0}, 0)
    spool.set_tags({"a": "b"})
    one = sender(folder, server)
    with pytest.warns(UserWarning, match="MLflow does not take a message"):
        send_all(one)
    assert [key for key, _, _ in server.metrics] == ["good", "fine"]
    assert server.tags == {"a": "b"}
    (refused,) = read_rows(folder.rejected)
    assert refused["values"] == {"bad": 1.0}
    assert "no such value" in refused["why"]
    assert not one.waiting_bytes


def test_another_server_is_told_everything(folder: SpoolFolder) -> None:
    Spool(folder).log_metrics({"loss": 1.0}, 0)
    send_all(sender(folder, Server()))
    assert not sender(folder, Server()).waiting_bytes
    elsewhere = Delivered.read(folder, "http://elsewhere", "e")
    assert (elsewhere.run_id, elsewhere.sent_bytes) == (None, 0)


def test_parameters_beyond_the_limits() -> None:
    values = flatten(
        {"a": {"b": 1, "c": None, "d": [1, 2]}, "long": "x" * 501, "k" * 251: 1, "q?": 2}
    )
    assert as_parameters(values) == {"a.b": "1", "a.c": "null", "a.d": "1, 2", "long": f"in {LONG}"}


def test_a_run_that_begins_anew_is_another(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = identify(run, "a,b", "1", goes_on=True)
    first.keep(run)
    Spool(SpoolFolder(run, "mlflow")).log_metrics({"loss": 1.0}, 0)
    assert identify(run, "a,b", "1", goes_on=True) == first
    assert first.wandb_id == f"a-b-1-{first.key}"
    other = identify(run, "a,b", "1", goes_on=False)
    assert other != first
    assert saved_identity(run) == first  # nothing is written yet
    other.keep(run)
    assert not SpoolFolder(run, "mlflow").size
    assert json.loads((run.tracking / "run.json").read_text())["key"] == other.key
