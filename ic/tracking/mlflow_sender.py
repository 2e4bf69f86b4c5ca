"""Messages of a spool on their way to an MLflow server: in order, each once, whatever fails."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ic.errors import one_line
from ic.files.atomic_write import write_json
from ic.files.json_lines import append_row
from ic.files.results import read_json
from ic.tracking.background import Sender
from ic.tracking.spool import Message, SpoolFolder, read_messages

_BAD_REQUEST = 400
_MESSAGES = 200  # that are read at once
_METRICS = 1000  # MLflow's limit of a request
_TAG_LENGTH = 5000  # of a tag; servers before 2.13 take no more


@dataclass
class Delivered:
    """How far a server has been told: `tracking/mlflow/sent.json`.

    Attributes:
        uri, experiment: the server and the experiment there.
        run_id: of the run there, once it is made.
        sent_bytes: of the spool that have arrived.
    """

    uri: str
    experiment: str
    run_id: str | None = None
    sent_bytes: int = 0

    @classmethod
    def read(cls, folder: SpoolFolder, uri: str, experiment: str) -> Delivered:
        """As the run's folder has it; another server or experiment is told everything."""
        saved = read_json(folder.sent)
        same = saved and (saved["uri"], saved["experiment"]) == (uri, experiment)
        return cls(**saved) if same else cls(uri, experiment)

    def write(self, folder: SpoolFolder) -> None:
        """Keep it in the run's folder."""
        write_json(folder.sent, asdict(self))


class MLflowSender(Sender):
    """Tells a server what the spool of a run holds.

    A request whose answer was lost, or that a killed process did not live to note, may have
    arrived. So the first metrics after a start or a failure are compared with the steps that the
    server has of each metric, and what it has is not sent again.

    Args:
        folder: of the spool.
        delivered: how far the server has been told.
        connect: finds the run of an id, or makes one -> MLflow's client and the id.
    """

    tracker = "MLflow"

    def __init__(
        self,
        folder: SpoolFolder,
        delivered: Delivered,
        connect: Callable[[str | None], tuple[Any, str]],
    ) -> None:
        self.folder = folder
        self.delivered = delivered
        self._connect = connect
        self._client: Any = None
        self._unsure = True

    def close(self) -> None:
        """Nothing: what was sent has arrived."""

    @property
    def waiting_bytes(self) -> int:
        """Of the spool, that have not arrived."""
        return max(0, self.folder.size - self.delivered.sent_bytes)

    def send_some(self) -> bool:
        """Send the next messages; whether there were any.

        Raises:
            Exception: whatever the client raises; nothing is lost, and the next call tries again.
        """
        found = list(
            islice(read_messages(self.folder.messages, self.delivered.sent_bytes), _MESSAGES)
        )
        if not found:
            return False
        try:
            if self._client is None:
                self._client, self.delivered.run_id = self._connect(self.delivered.run_id)
                self.delivered.write(self.folder)
            batch = _first_batch(found)
            self._send([message for message, _ in batch])
        except Exception:
            self._unsure = True
            raise
        self._unsure = False
        self.delivered.sent_bytes = batch[-1][1]
        self.delivered.write(self.folder)
        return True

    def _send(self, batch: list[Message]) -> None:
        try:
            self._deliver(batch)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if len(batch) > 1:  # find the message that the server does not take
                for message in batch:
                    self._send([message])
                return
            why = one_line(error)
            append_row(self.folder.rejected, {"why": why, **batch[0]})
            rank_zero_warn(f"MLflow does not take a message, now in {self.folder.rejected}: {why}")

    def _deliver(self, batch: list[Message]) -> None:
        """Send one message, or several of metrics."""
        from mlflow.entities import Param, RunTag

        client, run_id, message = self._client, self.delivered.run_id, batch[0]
        if message["kind"] == "metrics":
            if metrics := self._metrics(batch):
                client.log_batch(run_id, metrics=metrics)
        elif message["kind"] == "params":
            params = [Param(key, value) for key, value in message["values"].items()]
            for begin in range(0, len(params), 100):  # MLflow's limit of a request
                client.log_batch(run_id, params=params[begin : begin + 100])
        elif message["kind"] == "tags":
            values = message["values"].items()
            client.log_batch(run_id, tags=[RunTag(k, v[:_TAG_LENGTH]) for k, v in values])
        elif message["kind"] == "file":
            inside = os.path.dirname(message["name"]) or None
            file = self.folder.files / message["name"]
            client.log_artifact(run_id, str(file), inside)
        elif message["value"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, message["value"], message["time_ms"])

    def _metrics(self, batch: list[Message]) -> list[Any]:
        from mlflow.entities import Metric

        metrics = [
            # As Lightning's logger does.
            Metric(
                re.sub("[^a-zA-Z0-9_/. -]+", "", key), value, message["time_ms"], message["step"]
            )
            for message in batch
            for key, value in message["values"].items()
        ]
        if not self._unsure:
            return metrics
        there = {
            key: {known.step for known in self._client.get_metric_history(self._run_id, key)}
            for key in {metric.key for metric in metrics}
        }
        return [metric for metric in metrics if metric.step not in there[metric.key]]

    @property
    def where(self) -> str:
        return f"run {self.delivered.run_id} at {self.delivered.uri}"

    @property
    def _run_id(self) -> str:
        assert self.delivered.run_id is not None
        return self.delivered.run_id


def _first_batch(found: list[tuple[Message, int]]) -> list[tuple[Message, int]]:
    """One message, or as many of metrics as follow each other and fit into a request."""
    batch, size = found[:1], len(found[0][0].get("values", ()))
    if found[0][0]["kind"] != "metrics":
        return batch
    for message, end in found[1:]:
        if message["kind"] != "metrics" or size + len(message["values"]) > _METRICS:
            break
        batch.append((message, end))
        size += len(message["values"])
    return batch


def _is_refusal(error: Exception) -> bool:
    """Whether the server would answer the same again: a value that it does not take, a copy that
    somebody removed.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() == _BAD_REQUEST
    return isinstance(error, FileNotFoundError)
