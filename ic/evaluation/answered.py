"""Answered samples on disk: a line each, from which cells and everything that is shown are made.

A line of `samples.jsonl`:

    {"model": ..., "settings": ...,     identity of the weights and of the suite's settings
     "tokenizer": ...,                  identity of the vocabulary; earlier versions wrote none
     "ends": "2,7",                     tokens that end an answer; earlier versions wrote none
     "task": "single", ...,             the fields of the sample's cell
     "index": 3,                        which of the cell's samples, from 0
     "expected": ..., "text": ..., "correct": ..., "measured": {...},   of `suite.Score`
     "seconds": 0.2}                    its share of its batch

`measured` is there if the suite measures something. Earlier versions wrote `cells.jsonl`, a line a
cell with all of its answers; such files are read as the samples that they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ic.evaluation.suite import Cell, Row, Score
from ic.files.json_lines import read_rows, write_rows
from ic.files.run_folder import SuiteFolder

_NEEDED = ("model", "settings")
IDENTITY = (*_NEEDED, "tokenizer", "ends")
_OF_SCORE = ("expected", "text", "correct", "measured")
_NOT_OF_CELL = {*IDENTITY, *_OF_SCORE, "index", "seconds", "n", "answers"}


class Ranks(Protocol):
    """Processes that share samples, each with the whole model: a Lightning strategy or Fabric."""

    @property
    def global_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self, name: str | None = None) -> None: ...
    def broadcast(self, obj: Any, src: int = 0) -> Any: ...


def read_samples(path: Path) -> list[Row]:
    """Every answered sample of a suite's folder or file, each once, in the order of the file.

    Rows are as the docstring of this module shows; `sample_key` says which rows of two files are
    about the same question. A folder may hold samples of several models and settings, told apart by
    `IDENTITY`. What ranks have not merged yet is left out, and so is a
    last line that a crash cut short.

    Args:
        path: a folder that a suite was evaluated into, its `samples.jsonl`, or a `cells.jsonl` of
            an earlier version, by whatever name.

    Raises:
        ValueError: a line that is not JSON, or of neither form.
    """
    if path.is_dir():
        files = [SuiteFolder(path).earlier_cells, SuiteFolder(path).samples]
    else:
        files = [path]
    found: dict[tuple[Any, ...], Row] = {}
    for file in files:
        for number, row in enumerate(read_rows(file), 1):
            if not ("index" in row or "answers" in row) or not set(_NEEDED) <= row.keys():
                raise ValueError(
                    f"{file}, line {number}: neither a sample nor a cell of an evaluation; give a "
                    "samples.jsonl or cells.jsonl that `evaluate` or `fit` wrote"
                )
            for sample in _samples_of(row):
                key = (*(sample.get(name) for name in IDENTITY), sample_key(sample))
                found.setdefault(key, sample)
    return list(found.values())


def cell_fields(row: Row) -> Row:
    """The fields of the cell that a row of a sample, or of a cell, belongs to."""
    return {name: value for name, value in row.items() if name not in _NOT_OF_CELL}


def sample_key(row: Row) -> tuple[Any, ...]:
    """Which question of its suite a row of a sample answers: its cell's fields, and its index."""
    return (*sorted(cell_fields(row).items()), row["index"])


def sample_row(
    identity: Mapping[str, str], cell: Cell, index: int, score: Score, seconds: float
) -> Row:
    """The line of a sample."""
    said = asdict(score)
    return {
        **identity,
        **asdict(cell),
        "index": index,
        **{name: said[name] for name in _OF_SCORE if name != "measured" or score.measured},
        "seconds": round(seconds, 6),
    }


def cell_row(samples: Sequence[Row]) -> Row:
    """A cell's row from the rows of its samples, in the order of their indices."""
    identity = _identity(samples[0])
    in_order = sorted(samples, key=lambda row: row["index"])
    return {
        **identity,
        **cell_fields(samples[0]),
        "n": len(samples),
        "correct": sum(row["correct"] for row in in_order if row["correct"] is not None),
        "seconds": round(sum(row["seconds"] for row in in_order), 3),
        "answers": [{name: row[name] for name in _OF_SCORE if name in row} for row in in_order],
    }


def cells_of(samples: Iterable[Row]) -> list[Row]:
    """Rows of the cells whose samples are all there, in the order in which they begin."""
    by_cell: dict[tuple[Any, ...], list[Row]] = {}
    for row in samples:
        key = (*(row.get(name) for name in IDENTITY), *sorted(cell_fields(row).items()))
        by_cell.setdefault(key, []).append(row)
    return [cell_row(rows) for rows in by_cell.values() if len(rows) == rows[0]["samples"]]


def merge_rank_files(file: Path, ranks: Ranks | None = None, keyed: Sequence[Path] = ()) -> None:
    """Append the ranks' samples to `file` and remove their files; every rank calls this.

    Args:
        keyed: other files that every rank writes one of, whose rows have a `key` each.
    """
    if ranks is not None:
        ranks.barrier("samples written")
    if ranks is None or ranks.global_rank == 0:
        for each in keyed:
            _merge(each, lambda row: row["key"])
        # Last: as long as a rank's samples are not merged, whatever else it wrote may not be.
        _merge(file, lambda row: (*(row.get(name) for name in IDENTITY), sample_key(row)))
    if ranks is not None:
        ranks.barrier("samples merged")


def _merge(file: Path, key_of: Callable[[Row], Any]) -> None:
    parts = sorted(file.parent.glob(f"{file.stem}.rank*.jsonl"))
    if parts:
        # A kill after a merge may have left files whose rows are already in.
        once: dict[Any, Row] = {}
        for row in (row for part in (file, *parts) for row in read_rows(part)):
            once.setdefault(key_of(row), row)
        write_rows(file, list(once.values()))
    for part in parts:
        part.unlink()


def _identity(row: Row) -> Row:
    return {name: row[name] for name in IDENTITY if name in row}


def _samples_of(row: Row) -> Iterator[Row]:
    if "index" in row:
        yield row
        return
    shared = _identity(row) | cell_fields(row)
    seconds = row["seconds"] / len(row["answers"])
    for index, answer in enumerate(row["answers"]):
        yield {**shared, "index": index, **answer, "seconds": seconds}
