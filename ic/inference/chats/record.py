"""The batches of conversations on disk, from which an interrupted run goes on.

chats.jsonl            {"messages": [...]} a line; there once it is complete
chats.jsonl.batches    {"settings": {...}}, then a line per batch: its conversations, how many
                       were begun, and why some were dropped
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ic.checkpoint.source import find_source
from ic.files.json_lines import append_rows, read_rows, write_rows
from ic.inference.chats.options import MakeChatsOptions

Messages = list[dict[str, str]]


class ChatRecord:
    """What there is already, and what is added. Imports no PyTorch.

    Attributes:
        chats: conversations in their order.
        begun: how many were begun, those that were dropped with them.
        dropped: why some were, and how many.
        num_batches: batches that were written; the next has this number.

    Raises:
        ValueError: the files are of other settings, were changed, hold more than is asked for, or
            cannot be written.
    """

    def __init__(self, options: MakeChatsOptions) -> None:
        self.output = Path(options.output)
        self.file = Path(f"{options.output}.batches")
        self._count = options.count
        self._settings = options.settings(find_source(options.checkpoint))
        self.chats: list[Messages] = []
        self.begun, self.num_batches = 0, 0
        self.dropped: Counter[str] = Counter()
        rows = read_rows(self.file)
        # A run that was cut short within its first batch leaves them alone.
        self._has_settings = bool(rows)
        if rows:
            self._check_settings(rows[0])
        for number, row in enumerate(rows[1:], 2):
            if not _is_batch(row):
                raise _no_such_row(self.file, number, "batch of conversations")
            self._take(row)
        self._check_folder()
        self._check_output(bool(rows))

    @property
    def is_complete(self) -> bool:
        """Whether no conversation is missing."""
        return len(self.chats) >= self._count

    def add(self, chats: list[Messages], begun: int, dropped: Counter[str]) -> None:
        """A batch, written at once."""
        row = {"batch": self.num_batches, "begun": begun, "dropped": dropped, "chats": chats}
        first = [] if self._has_settings else [{"settings": self._settings}]
        append_rows(self.file, [*first, row])
        self._has_settings = True
        self._take(row)

    def write(self) -> None:
        """The file of conversations, whole."""
        write_rows(self.output, ({"messages": chat} for chat in self.chats[: self._count]))

    def _take(self, row: dict[str, Any]) -> None:
        self.chats += row["chats"]
        self.begun += row["begun"]
        self.dropped.update(row["dropped"])
        self.num_batches += 1

    def _check_folder(self) -> None:
        """Make the folder, and write to it, so that no batch is lost for want of one."""
        told = f"output={self.output}: cannot be written"
        for file in (self.output, self.file):
            if file.is_dir():
                raise ValueError(f"{told}: {file} is a folder; give another output=")
        folder = self.output.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{told} in {folder}: {error.strerror}; give another output="
            ) from error

    def _check_settings(self, row: Any) -> None:
        was = row.get("settings") if isinstance(row, dict) else None
        if not isinstance(was, dict):
            raise _no_such_row(self.file, 1, "settings of conversations")
        keys = {**self._settings, **was}
        if other := [key for key in keys if was.get(key) != self._settings.get(key)]:
            told = ", ".join(
                f"{key}={was.get(key)} (now {self._settings.get(key)})" for key in other
            )
            raise ValueError(
                f"{self.file}: holds conversations of other settings: {told}; set them back, give "
                f"another output=, or delete it and {self.output}"
            )

    def _check_output(self, recorded: bool) -> None:
        if not self.output.exists():
            return
        if not recorded:
            raise ValueError(
                f"{self.output} is there, and no {self.file.name} beside it that tells what it was "
                "made with; give another output=, or delete it"
            )
        rows = read_rows(self.output)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise _no_such_row(self.output, number, "conversation")
        held = [row.get("messages") for row in rows]
        if len(held) > self._count:
            raise ValueError(
                f"{self.output} holds {len(held)} conversations, more than count={self._count}; "
                "give another output=, or delete it"
            )
        if held != self.chats[: len(held)]:
            raise ValueError(
                f"{self.output} was changed after it was made; give another output=, or delete it"
            )


def _is_batch(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("begun"), int)
        and isinstance(row.get("chats"), list)
        and all(_is_chat(chat) for chat in row["chats"])
        and isinstance(row.get("dropped"), dict)
        and all(isinstance(number, int) for number in row["dropped"].values())
    )


def _is_chat(chat: Any) -> bool:
    return (
        isinstance(chat, list)
        and all(isinstance(message, dict) for message in chat)
        and all(isinstance(message.get("content"), str) for message in chat)
        and any(message.get("role") == "user" for message in chat)
    )


def _no_such_row(file: Path, number: int, wanted: str) -> ValueError:
    return ValueError(f"{file}, line {number}: holds no {wanted}; repair or delete the file")
