"""What an evaluation leaves beside its cells: a CSV file and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ic.evaluation.suite import Row, Suite
from ic.files.atomic_write import replacing
from ic.files.run_folder import SuiteFolder

_SHARES = ("accuracy", "low_95", "high_95")


def write_report(
    suite: Suite[Any],
    cells: Sequence[Row],
    folder: SuiteFolder,
    *,
    title: str,
    trained_length: int | None = None,
) -> Path:
    """Write the suite's CSV file and its picture into `folder` -> the picture.

    Args:
        trained_length: longest context in tokens that was trained, to be marked.
    """
    write_csv(suite.rows(cells), folder.table(suite.picture))
    picture = folder.picture(suite.picture)
    suite.draw(cells, picture, title=title, trained_length=trained_length)
    return picture


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row of a results file, without `what`."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        names = [name for name in rows[0] if name != "what"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            shares = {name: f"{row[name]:.4f}" for name in _SHARES if row.get(name) is not None}
            writer.writerow({**row, **shares})
