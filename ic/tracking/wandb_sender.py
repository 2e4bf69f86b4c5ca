"""Messages of a spool on their way to W&B: in order, each once, whatever fails.

Each message that makes a row of W&B's history has a step of W&B's own: its number in the spool.
W&B says at the begin of a resumed run which step comes next, and so which messages it has.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ic.files.atomic_write import write_json
from ic.files.results import read_json
from ic.tracking.background import Sender
from ic.tracking.spool import STEP, TOKENS, X_AXIS, Message, SpoolFolder, read_messages

_MESSAGES = 200  # that are sent at once


class WandbSender(Sender):
    """Hands messages to W&B's client, which sends them by itself; `close` waits for that.

    Args:
        folder: of the spool.
        connect: begins or resumes the run there -> W&B's run.
    """

    tracker = "W&B"

    def __init__(self, folder: SpoolFolder, connect: Callable[[], Any]) -> None:
        self.folder = folder
        self._connect = connect
        self._run: Any = None
        self._handed_bytes = 0
        self._row = 0  # the number of the next message that makes a row
        self._next_row = 0  # that the server has not
        self._tokens: dict[str, float] = {}
        self._url = ""

    @property
    def waiting_bytes(self) -> int:
        return max(0, self.folder.size - read_json(self.folder.sent).get("sent_bytes", 0))

    @property
    def where(self) -> str:
        return self._url

    def send_some(self) -> bool:
        if not self.waiting_bytes:
            return False
        if self._run is None:
            run = self._connect()
            self._run, self._next_row, self._url = run, run.step, run.url or ""
            self._handed_bytes = self._row = 0  # files and configuration are told anew
        found = list(islice(read_messages(self.folder.messages, self._handed_bytes), _MESSAGES))
        try:
            for message, end in found:
                self._hand(message)
                self._handed_bytes = end
        except Exception:
            self._run = None  # begin it anew, and ask the server how far it has been told
            raise
        return bool(found)

    def close(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        run.finish()
        write_json(self.folder.sent, {"sent_bytes": self._handed_bytes})

    def _hand(self, message: Message) -> None:
        run, kind = self._run, message["kind"]
        if kind == "metrics":
            if TOKENS in message["values"]:  # once for a step
                self._tokens = {TOKENS: message["values"][TOKENS]}
            row = {**message["values"], **self._tokens, STEP: message["step"]}
            self._log(lambda: row, message["time_ms"])
        elif kind == "file":
            self._hand_file(self.folder.files / message["name"], message["name"])
        elif kind == "tags":
            if (axis := message["values"].get(X_AXIS)) is not None:
                run.define_metric(axis)
                run.define_metric("*", step_metric=axis, step_sync=True)
            changed = {k: v for k, v in message["values"].items() if k.startswith("changed.")}
            run.config.update(changed, allow_val_change=True)

    def _hand_file(self, file: Path, name: str) -> None:
        run = self._run
        if not file.is_file():
            return  # somebody has removed the copy
        tag, _, step = name.rpartition("/step=")
        if not tag:
            run.save(str(file), base_path=str(self.folder.files), policy="now")
            if name == "config.yaml":
                run.config.update(yaml.safe_load(file.read_text()), allow_val_change=True)
            elif name == "environment.json":
                facts = json.loads(file.read_text())
                run.config.update({"start": facts}, allow_val_change=True)
            return
        self._log(lambda: {tag: _shown(file), STEP: int(Path(step).stem), **self._tokens})

    def _log(self, row: Callable[[], dict[str, Any]], time_ms: int | None = None) -> None:
        """Log a row unless the server has it."""
        if self._row >= self._next_row:
            values = row() if time_ms is None else {"_timestamp": time_ms / 1000, **row()}
            self._run.log(values, step=self._row)
        self._row += 1


def _shown(file: Path) -> Any:
    """A picture, a table or a text as W&B shows it."""
    import wandb

    if file.suffix == ".png":
        return wandb.Image(str(file))
    if file.suffix != ".csv":
        return wandb.Table(columns=["text"], data=[[file.read_text()]])
    columns, *rows = _cells(file)
    return wandb.Table(columns=[*columns], data=[[_number(cell) for cell in row] for row in rows])


def _cells(file: Path) -> Iterator[list[str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        yield from csv.reader(lines)


def _number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell
