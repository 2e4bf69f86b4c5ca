"""Reads that fail for a moment are done again, at the row where they stopped; others are not."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_none

from ic.datamodules import text_files
from ic.datamodules.text_files import TextFiles
from ic.files.retry_io import ATTEMPTS, retry_transient


class Flaky(TextFiles):
    """Fails with `code` before every table from the second on, `times` times in all."""

    code, times = errno.ESTALE, 0

    def _open(self, file_index: int, start_row: int) -> Iterator[Any]:
        for number, table in enumerate(super()._open(file_index, start_row)):
            if number and self.times:
                self.times -= 1
                raise OSError(self.code, "from the file system")
            yield table


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flaky:
    monkeypatch.setattr(text_files._Tables._next.retry, "wait", wait_none())
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


def test_it_gives_up() -> None:
    calls = 0

    def read() -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.EIO, "still")

    patient = retry_transient(read)
    patient.retry.wait = wait_none()  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="still"):
        patient()
    assert calls == ATTEMPTS
