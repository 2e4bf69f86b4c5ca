"""CSV metrics that go on after a resume; Lightning's logger deletes the file it finds."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from ic.files.run_folder import RunFolder


class ContinuedCSVLogger(CSVLogger):
    """Keeps the rows of `metrics.csv` that a resumed run does not write again.

    Args:
        first_step: the first step that this process takes; rows from it on are dropped, since a run
            that died after its last checkpoint has logged steps that are now taken again. So is the
            validation after the step before it, which a resumed run begins with.
    """

    def __init__(self, root_dir: Path, *, version: str, first_step: int) -> None:
        super().__init__(root_dir, name="", version=version)
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            rows = self._earlier_rows()
            with warnings.catch_warnings(action="ignore"):  # that files will be deleted
                writer: Any = super().experiment
            writer.metrics = rows
            writer.save()
        return self._experiment

    def _earlier_rows(self) -> list[dict[str, Any]]:
        file = RunFolder(self.root_dir).metrics
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            return [
                {key: value for key, value in row.items() if value}
                for row in csv.DictReader(lines)
                if not self._comes_again(row)
            ]

    def _comes_again(self, row: dict[str, Any]) -> bool:
        validation = any(value for key, value in row.items() if key.startswith("val/"))
        return int(row["step"]) + validation >= self.first_step
