"""What a tracking server is to be told, in the run's folder until it has been told.

`tracking/<tracker>/spool.jsonl` is only ever appended to, a line for each message in the order in
which they came. A sender (`ic.tracking.mlflow_sender`, `ic.tracking.wandb_sender`) reads it from
where the server's share ends. A message is one of

    {"kind": "metrics", "step": 5, "time_ms": ..., "values": {"train/loss": 2.5}}
    {"kind": "params", "values": {"model.hidden_size": "64"}}
    {"kind": "tags", "values": {"slurm.job_id": "12"}}
    {"kind": "file", "name": "pictures/passkey/step=5.png"}     a copy below files/
    {"kind": "status", "value": "FINISHED", "time_ms": ...}
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ic.files.json_lines import append_rows, read_rows
from ic.files.run_folder import RunFolder

Message = dict[str, Any]
# The x axis, where tokens are counted: the first row of each step carries it.
TOKENS = "tokens"
STEP = "trainer/global_step"  # the x axis elsewhere, by the name that Lightning's logger gives it
X_AXIS = "x_axis"  # the tag that says which of the two it is
# A power loss may take what was logged within so many seconds; a killed process loses nothing.
_SYNC_EVERY_S = 1.0


class SpoolFolder:
    """What a tracker of a run has: `tracking/<name>`.

    Attributes:
        messages: the spool.
        files: copies of files that messages name.
        sent: how far the server has been told.
        rejected: messages that it did not take, and why.
    """

    def __init__(self, run: RunFolder, name: str) -> None:
        self.path = path = run.tracking / name
        self.messages = path / "spool.jsonl"
        self.files = path / "files"
        self.sent = path / "sent.json"
        self.rejected = path / "rejected.jsonl"

    @property
    def size(self) -> int:
        """Of the messages, in bytes."""
        return self.messages.stat().st_size if self.messages.is_file() else 0


class Spool:
    """The messages of a run; one process writes them.

    A step that a resumed run takes again is not logged again: each metric begins behind the last
    step that an earlier process logged it at.
    """

    def __init__(self, folder: SpoolFolder) -> None:
        self.file, self.files = folder.messages, folder.files
        self.params: dict[str, str] = {}
        self._logged_before: dict[str, int] = {}
        self._token_steps: set[int] = set()
        self._synced_at = 0.0
        self._unwritten: list[Message] = []  # as long as a disk is full
        for message in read_rows(self.file):
            if message["kind"] == "metrics":
                for key in message["values"]:
                    newest = self._logged_before.get(key, -1)
                    self._logged_before[key] = max(newest, message["step"])
                if TOKENS in message["values"]:
                    self._token_steps.add(message["step"])
            elif message["kind"] == "params":
                self.params.update(message["values"])

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append what no earlier process has logged at this step."""
        new = {
            key: float(value)
            for key, value in values.items()
            if step > self._logged_before.get(key, -1) and key != TOKENS
        }
        if not new:
            return
        if TOKENS in values and step not in self._token_steps:
            self._token_steps.add(step)
            new[TOKENS] = float(values[TOKENS])
        self._append({"kind": "metrics", "step": step, "time_ms": now_ms(), "values": new})

    def log_params(self, values: Mapping[str, str]) -> None:
        """Append parameters, which a server takes once and never changes."""
        self.params.update(values)
        self._append({"kind": "params", "values": dict(values)})

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Append tags, of which the last value counts."""
        self._append({"kind": "tags", "values": dict(values)})

    def add_file(self, file: Path, name: str) -> None:
        """Copy a file, which may be written anew later, and append its copy."""
        copy = self.files / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        self._append({"kind": "file", "name": name})

    def add_text(self, text: str, name: str) -> None:
        """Write a text to a file and append that."""
        copy = self.files / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
        self._append({"kind": "file", "name": name})

    def set_status(self, value: str) -> None:
        """Append how the run is: RUNNING, FINISHED, FAILED or KILLED."""
        self._append({"kind": "status", "value": value, "time_ms": now_ms()})

    def sync(self, at_once: bool = False) -> None:
        """Have the disk hold what was appended, once per second unless `at_once`."""
        if not at_once and time.monotonic() - self._synced_at < _SYNC_EVERY_S:
            return
        self._synced_at = time.monotonic()
        if self.file.is_file():
            with self.file.open("rb") as lines:
                os.fsync(lines.fileno())

    def _append(self, message: Message) -> None:
        self._unwritten.append(message)
        append_rows(self.file, self._unwritten)
        self._unwritten.clear()


def read_messages(file: Path, start: int) -> Iterator[tuple[Message, int]]:
    """Messages from an offset on, each with the offset of its end in bytes.

    A last line that is not whole is left out: it is being written, or was cut short.
    """
    if not file.is_file():
        return
    with file.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield json.loads(line), start


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return int(time.time() * 1000)
