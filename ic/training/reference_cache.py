"""Log-probabilities of a reference model on disk, one line a pair.

The first line identifies the reference; each further one is a pair under the hash of its tokens. A
line is written as soon as it is known, to `<file>.rank<r>.partial`; when all are there, they go to
`<file>` in the order of the data. So a run that was killed goes on where it stopped and ends with
the same file, and ranks share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ic.files.json_lines import append_row, read_rows, write_rows

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
        self._begun: set[Path] = set()
        self.reload()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a row, in order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows]

    def append(self, key: str, row: dict[str, Any], rank: int = 0) -> None:
        """Keep a row, in memory and on disk."""
        assert self.identity is not None
        partial = self.path.with_name(f"{self.path.name}.rank{rank}.partial")
        if partial not in self._begun and not read_rows(partial):
            append_row(partial, self.identity)
        self._begun.add(partial)
        append_row(partial, {"key": key, **row})
        self.rows[key] = row

    def reload(self) -> None:
        """Read what is on disk, other ranks' rows included. Reading changes no file."""
        for file in (self.path, *self._partials()):
            if file.is_file():
                self._read(file)

    def gather(self, keys: Iterable[str], is_writer: bool, barrier: Callable[[str], None]) -> None:
        """Every rank calls this after its last `append`: one of them, the writer, makes the
        finished file of all ranks' rows, and all hold them afterwards.
        """
        barrier("reference cache written")
        if is_writer:
            self.reload()
            self._finish(keys)
        barrier("reference cache finished")
        self.reload()  # from the finished file: the ranks' files are gone by now

    def _finish(self, keys: Iterable[str]) -> None:
        """Write all rows to `path`, those of `keys` first and in their order."""
        assert self.identity is not None
        order = dict.fromkeys([*keys, *self.rows])
        write_rows(self.path, [self.identity, *({"key": key, **self.rows[key]} for key in order)])
        for partial in self._partials():
            partial.unlink()

    def _partials(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.rank*.partial"))

    def _read(self, file: Path) -> None:
        try:
            lines = read_rows(file)
            read = {row.pop("key"): row for row in lines[1:]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete it to compute it again") from error
        if not lines:
            return
        header = lines[0]
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
