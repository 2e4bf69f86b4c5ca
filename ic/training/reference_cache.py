"""Log-probabilities of a reference model on disk, one line a pair.

The first line identifies the reference; each further one is a pair under the hash of its tokens. A
line is written as soon as it is known, to `<file>.rank<r>.partial`; when all are there, they go to
`<file>` in the order of the data. So a run that was killed goes on where it stopped and ends with
the same file, and ranks share the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ic.atomic_write import replacing

Header = dict[str, str]


class ReferenceCache:
    """Rows by pair: sums of `sum_per_sequence`, chosen and rejected, shared and tail.

    Args:
        path: the finished file.
        identity: what the log-probabilities depend on besides the tokens; None takes the file's.

    Raises:
        ValueError: a file (or an unfinished one) of another reference, or one that is damaged.
    """

    def __init__(self, path: Path, identity: Header | None) -> None:
        self.path = path
        self.identity = identity
        self.rows: dict[str, dict[str, Any]] = {}
        for file in (path, *self._partials()):
            if file.is_file():
                self._read(file)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a row, in order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows]

    def append(self, key: str, row: dict[str, Any], rank: int = 0) -> None:
        """Keep a row, in memory and on disk."""
        partial = self._partial(rank)
        partial.parent.mkdir(parents=True, exist_ok=True)
        begins = not partial.is_file()
        with partial.open("a") as file:
            if begins:
                file.write(json.dumps(self.identity) + "\n")
            file.write(json.dumps({"key": key, **row}) + "\n")
        self.rows[key] = row

    def reload(self) -> None:
        """Read the rows that other ranks have written."""
        for file in self._partials():
            self._read(file)

    def finish(self, keys: Iterable[str]) -> None:
        """Write all rows to `path`, those of `keys` first and in their order."""
        order = dict.fromkeys([*keys, *self.rows])
        with replacing(self.path) as temporary, temporary.open("w") as file:
            file.write(json.dumps(self.identity) + "\n")
            for key in order:
                file.write(json.dumps({"key": key, **self.rows[key]}) + "\n")
        for partial in self._partials():
            partial.unlink()

    def _partial(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}.partial")

    def _partials(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.rank*.partial"))

    def _read(self, file: Path) -> None:
        lines = file.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # cut short when the run was killed
            lines.pop()
            with replacing(file) as temporary:
                temporary.write_text("".join(lines))
        if not lines:
            file.unlink()
            return
        try:
            header, *rows = (json.loads(line) for line in lines)
            read: dict[str, dict[str, Any]] = {row.pop("key"): row for row in rows}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete it to compute it again") from error
        if self.identity is None:
            self.identity = header
        elif header != self.identity:
            first = next((row["row"] for row in read.values()), "none yet")
            changed = ", ".join(
                f"{key} {header.get(key)} (now {value})"
                for key, value in self.identity.items()
                if header.get(key) != value
            )
            raise ValueError(
                f"{file} holds log-probabilities of another reference: {changed}; its first row "
                f"is of {first}. Delete it, or choose another file with preference.reference_cache"
            )
        self.rows.update(read)
