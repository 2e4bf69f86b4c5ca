"""Rows that were written whole come back, wherever a crash cut the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ic.files.json_lines import append_row, read_rows, write_rows

ROWS = [{"key": "a", "sums": [1.5, -2.0]}, {"key": "b", "text": "Zürich\n"}, {"key": "c", "n": 3}]


def test_every_cut_loses_at_most_the_row_being_written(tmp_path: Path) -> None:
    file = tmp_path / "below" / "rows.jsonl"
    for row in ROWS:
        append_row(file, row)
    whole = file.read_bytes()
    assert whole.decode() == "".join(json.dumps(row) + "\n" for row in ROWS)
    ends = [len("".join(json.dumps(row) + "\n" for row in ROWS[:n])) for n in range(4)]
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        # A row is there from its last bracket on, whether or not its line was ended.
        left = ROWS[: sum(size >= end - 1 for end in ends[1:])]
        assert read_rows(file) == left, size
        assert file.read_bytes() == whole[:size], size  # reading changes nothing
        append_row(file, {"key": "new"})
        assert read_rows(file) == [*left, {"key": "new"}], size


def test_a_character_cut_in_two(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' + '{"b": "ü'.encode()[:-1])
    assert read_rows(file) == [{"a": 1}]
    append_row(file, {"c": 2})
    assert file.read_bytes() == b'{"a": 1}\n{"c": 2}\n'


def test_a_file_written_whole_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, ROWS)
    write_rows(file, ROWS[1:])
    assert read_rows(file) == ROWS[1:]

    def failing():
        yield ROWS[0]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_rows(file, failing())
    assert read_rows(file) == ROWS[1:]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{oops}\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not JSON .*repair or delete"):
        read_rows(file)
    assert read_rows(tmp_path / "absent.jsonl") == []
