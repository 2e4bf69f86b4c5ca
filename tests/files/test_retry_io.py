"""Reads that fail for a moment are done again, at the row where they stopped; others are not."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ic.datamodules.text_files import TextFiles
from ic.files import retry_io
from ic.files.retry_io import retrying


class Flaky(TextFiles):
    """Fails with `code` before every table from the second on, `times` times in all."""

    code, times = errno.ESTALE, 0

    def _open(self, file_index: int, start_row: int) -> Iterator[Any]:
        for number, table in enumerate(super()._open(file_index, start_row)):
            if number and self.times:
                self.times -= 1
                raise OSError(self.code, "from the file system")
            yield table


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_io, "FIRST_WAIT_S", 0)
    monkeypatch.setattr(retry_io, "JITTER_S", 0)


@pytest.fixture
def flaky(tmp_path: Path) -> Flaky:
    file = tmp_path / "rows.txt"
    file.write_text("".join(f"line {i}\n" for i in range(700)))
    return Flaky([str(file)], "text", "text", "line")


def test_a_transient_error_changes_nothing(flaky: Flaky) -> None:
    flaky.times = 2
    rows = list(flaky.documents(0))
    assert rows == [(i, f"line {i}") for i in range(700)]
    assert flaky.times == 0


def test_other_errors_are_not_tried_again(flaky: Flaky) -> None:
    flaky.times, flaky.code = 2, errno.EACCES
    with pytest.raises(ValueError, match="cannot be read as text"):
        list(flaky.documents(0))
    assert flaky.times == 1


@pytest.mark.parametrize(
    ("error", "attempts"), [(OSError(errno.EIO, "still"), 5), (RuntimeError("not the disk"), 1)]
)
def test_it_gives_up(error: Exception, attempts: int) -> None:
    calls = 0

    def read() -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)) as caught:
        retrying(read)
    assert caught.value is error
    assert calls == attempts


def test_waits_double_from_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def read() -> None:
        raise OSError(errno.ESTALE, "the server is away")

    with pytest.raises(OSError, match="the server is away"):
        retrying(read)
    assert [int(2 * wait) / 2 for wait in waits] == [0.5, 1.0, 2.0, 4.0]  # jitter is below 0.25 s
