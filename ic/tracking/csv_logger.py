"""CSV metrics that survive a crash and go on after a resume; Lightning's logger keeps neither."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ic.files.atomic_write import replacing
from ic.files.run_folder import RunFolder
from ic.tracking.never_fails import NeverFails

Row = dict[str, Any]


class MetricsWriter(ExperimentWriter):
    """Appends whole rows; with a new column a new file takes the old one's place.

    Args:
        log_dir: where `metrics.csv` lies.
        rows: what the file is to begin with, in place of what it holds.
    """

    def __init__(self, log_dir: str, rows: list[Row]) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        self.metrics = rows
        self._header: list[str] | None = None  # of the file, once this writer has written it
        self._end = 0  # of its last whole row
        if not rows:
            self.file.unlink(missing_ok=True)

    def save(self) -> None:
        if not self.metrics:
            return
        self._record_new_keys()
        size = self.file.stat().st_size if self.file.is_file() else 0
        if self._header == self.metrics_keys and size >= self._end:
            self._append()
        else:
            earlier = [] if self._header is None else read_metrics(self.file)
            self._write_anew([*earlier, *self.metrics])
        self.metrics = []

    def _append(self) -> None:
        text = _as_csv(self.metrics_keys, self.metrics)
        with self.file.open("r+b") as lines:
            lines.truncate(self._end)  # a row that a full disk cut short
            lines.seek(self._end)
            lines.write(text)
        self._end += len(text)

    def _write_anew(self, rows: list[Row]) -> None:
        header = list(self.metrics_keys)
        text = _as_csv(header, [dict(zip(header, header, strict=True)), *rows])
        with replacing(self.file) as temporary:
            temporary.write_bytes(text)
        self._header, self._end = header, len(text)

    def _check_log_dir_exists(self) -> None:
        """Nothing: Lightning deletes the file that it finds."""


class MetricsLogger(NeverFails, CSVLogger):
    """`csv/metrics.csv` of a run.

    Args:
        run: the run.
        first_step: the first step that this process takes, if it continues a run. Rows from it on
            are dropped: a run that died after its last checkpoint has logged steps that are now
            taken again. So is the validation after the step before it, which a resumed run begins
            with. None begins a new file.
    """

    PAUSE_S = 0.0  # what could not be written waits in memory, and nothing is lost

    def __init__(self, run: RunFolder, first_step: int | None) -> None:
        super().__init__(run.path, name="", version=run.csv.name)
        self.run = run
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = self._attempt(lambda: MetricsWriter(self.log_dir, self._earlier()))
        return self._experiment or _DummyExperiment()

    def _earlier(self) -> list[Row]:
        if self.first_step is None:
            return []
        rows = read_metrics(self.run.metrics)
        if not rows and self.run.metrics.is_file() and self.run.metrics.stat().st_size:
            kept = self.run.metrics.with_suffix(".damaged.csv")
            self.run.metrics.replace(kept)
            rank_zero_warn(f"{self.run.metrics} cannot be read; it is now {kept}")
        return [row for row in rows if not self._comes_again(row)]

    def _comes_again(self, row: Row) -> bool:
        validation = any(key.startswith("val/") for key in row)
        return int(row["step"]) + validation >= (self.first_step or 0)


def read_metrics(file: Path) -> list[Row]:
    """Rows of a `metrics.csv`, without their empty cells; none if there is no such file.

    Rows that a power loss cut short or overwrote are left out, with a warning that names the file.
    """
    if not file.is_file():
        return []
    header, *lines = file.read_bytes().decode(errors="replace").splitlines(keepends=True) or [""]
    columns = next(csv.reader([header]), [])
    rows = [
        {key: value for key, value in zip(columns, cells, strict=True) if value}
        for line in lines
        if len(cells := next(csv.reader([line.replace("\0", "\ufffd")]), [])) == len(columns)
        and line.endswith("\n")
    ]
    whole = [row for row in rows if row.get("step", "").isdecimal()]
    if len(whole) < len(lines):
        rank_zero_warn(f"{file}: {len(lines) - len(whole)} damaged rows are left out")
    return whole


def _as_csv(header: list[str], rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, header).writerows(rows)
    return text.getvalue().encode()
