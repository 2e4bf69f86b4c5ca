"""Files of JSON lines, a row a line, that survive a crash: what was written whole stays readable.

A process that is killed while it appends leaves a last line that is cut short. Readers leave it
out; the next append takes it off the file first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ic.files.atomic_write import named, replacing


def rank_file(results_file: Path, rank: int) -> Path:
    """Where a rank that shares an evaluation writes its samples until they are merged."""
    return results_file.with_name(f"{results_file.stem}.rank{rank}.jsonl")


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Add a row at the end of a file that this process alone writes; it is made if need be."""
    append_rows(file, [row])


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows as `append_row` does."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as lines:
            if lines.tell():
                lines.seek(-1, os.SEEK_END)
                if lines.read() != b"\n":
                    _end_last_line(file)
            lines.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    except OSError as error:
        raise named(error, file) from None


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of these rows whole, in place of the one that is there."""
    with replacing(file) as temporary, temporary.open("w") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file, none if there is no such file. Reading changes nothing.

    A last line that a crash cut short is left out: another process may be writing it.

    Raises:
        ValueError: any other line that is not JSON.
    """
    if not file.is_file():
        return []
    rows, lines = [], file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # also of bytes that are no text: a character cut in two
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(
                f"{file}, line {number}: not JSON ({error}); repair or delete the file"
            ) from error
    return rows


def _end_last_line(file: Path) -> None:
    """Take a last line that is cut short off the file; end one that lacks only its end."""
    data = file.read_bytes()
    start = data.rfind(b"\n") + 1
    with file.open("r+b") as lines:
        try:
            json.loads(data[start:])
            lines.seek(0, os.SEEK_END)
            lines.write(b"\n")
        except ValueError:
            lines.truncate(start)
