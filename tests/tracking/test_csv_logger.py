"""`metrics.csv` is whole at every moment, and a resume keeps all of it that is whole."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from ic.files.run_folder import RunFolder
from ic.tracking.csv_logger import MetricsLogger, read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def log(logger: MetricsLogger, step: int, **values: float) -> None:
    """As Lightning's trainer does it."""
    logger.log_metrics(values, step=step)
    logger.save()


def rows(run: RunFolder) -> list[dict[str, str]]:
    """As any other program reads them."""
    with run.metrics.open(newline="") as lines:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(lines)]


@pytest.fixture
def logged(run: RunFolder) -> RunFolder:
    """Four steps, with a column that comes at the third."""
    logger = MetricsLogger(run, None)
    for step in range(4):
        log(logger, step, loss=step / 3, **({"passkey": 0.5} if step == 2 else {}))
    logger.finalize("success")
    return run


def test_a_new_column_keeps_the_rows_before_it(logged: RunFolder) -> None:
    assert [float(row["loss"]) for row in rows(logged)] == [step / 3 for step in range(4)]
    assert [row.get("passkey") for row in rows(logged)] == [None, None, "0.5", None]
    assert [row["step"] for row in rows(logged)] == ["0", "1", "2", "3"]
    assert [path.name for path in logged.csv.iterdir()] == ["metrics.csv"]


def test_the_file_is_whole_whenever_a_process_dies(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at each change of the file system that writing makes: a kill could come there."""
    seen: list[bytes | None] = []

    def look() -> None:
        try:
            descriptor = os.open(run.metrics, os.O_RDONLY)
        except FileNotFoundError:
            seen.append(None)
            return
        seen.append(os.read(descriptor, 100_000))
        os.close(descriptor)

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            look()
            result = function(*args, **kwargs)
            look()
            return result

        return call

    logger = MetricsLogger(run, None)
    log(logger, 0, loss=1.0)
    before = run.metrics.read_bytes()
    for name in ("replace", "unlink", "remove", "rename"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    for name in ("write_bytes", "unlink", "open"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    log(logger, 1, other=2.0)  # a new column: all rows are written again
    monkeypatch.undo()
    assert len(seen) > 2
    assert set(seen) == {before, run.metrics.read_bytes()}


def test_a_resume_drops_the_steps_that_are_taken_again(logged: RunFolder) -> None:
    logger = MetricsLogger(logged, 2)
    log(logger, 2, loss=7.0)
    assert [row["loss"] for row in rows(logged)] == ["0.0", str(1 / 3), "7.0"]
    again = MetricsLogger(logged, None)  # a run begun anew
    assert again.experiment is not None
    assert not logged.metrics.exists()


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        (lambda text: text[:-5], 3),  # amid the last row
        (lambda text: text[:-2], 3),  # only its end is missing: the number may go on
        (lambda text: text.replace(b",,1", b",1"), 3),
        (lambda text: text[:-8] + b"\0" * 8, 3),  # what ext4 leaves of a block
        (lambda text: text.replace(b",1\r\n", b",1"), 2),  # two rows that became one
    ],
)
def test_cut_rows_are_named_and_left_out(logged: RunFolder, cut: Any, kept: int) -> None:
    text = logged.metrics.read_bytes()
    damaged = cut(text)
    assert damaged != text
    logged.metrics.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"csv/metrics\.csv: \d damaged rows are left out"):
        log(MetricsLogger(logged, 9), 9, loss=1.0)
    assert len(rows(logged)) == kept + 1
    assert rows(logged)[-1] == {"loss": "1.0", "step": "9"}


@pytest.mark.parametrize("content", [b"\0" * 100, b"loss,st", b"\xff\xfe\n1,2\n"])
def test_a_file_without_its_header_is_set_aside(run: RunFolder, content: bytes) -> None:
    run.csv.mkdir()
    run.metrics.write_bytes(content)
    with pytest.warns(UserWarning, match=r"metrics\.csv cannot be read; it is now .*damaged\.csv"):
        log(MetricsLogger(run, 5), 5, loss=1.0)
    assert rows(run) == [{"loss": "1.0", "step": "5"}]
    assert (run.csv / "metrics.damaged.csv").read_bytes() == content


def test_the_folder_removed_while_running(run: RunFolder) -> None:
    logger = MetricsLogger(run, None)
    log(logger, 0, loss=1.0)
    shutil.rmtree(run.csv)
    log(logger, 1, loss=2.0)
    log(logger, 2, loss=3.0)
    assert [row["step"] for row in rows(run)] == ["1", "2"]


def test_a_full_disk_costs_no_row(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsLogger(run, None)
    log(logger, 0, loss=1.0)
    whole = run.metrics.read_bytes()
    path_open = Path.open

    class Full:
        """A file on a disk that has room for three more bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.file.write(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args, **kw: Full(path_open(self, *args, **kw)))
        with warnings.catch_warnings(record=True) as told:
            log(logger, 1, loss=2.0)
            log(logger, 2, loss=3.0)
    assert [str(w.message).partition(". ")[0] for w in told] == [
        "MetricsLogger failed: OSError: [Errno 28] No space left on device"
    ]
    assert run.metrics.read_bytes() != whole
    log(logger, 3, loss=4.0)
    assert [row["loss"] for row in rows(run)] == ["1.0", "2.0", "3.0", "4.0"]
    assert read_metrics(run.metrics) == rows(run)
