"""What a run has measured so far, for its trackers: pictures and tables of its folder."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ic.files.atomic_write import replacing
from ic.files.results import read_json
from ic.files.run_folder import RunFolder
from ic.tracking.tracker import Tracker


def log_outcome(trackers: Iterable[Tracker], folder: RunFolder, step: int) -> None:
    """Log the pictures of losses and memory, and throughput as a table. Suites, such as passkeys
    and perplexity, log theirs when they are evaluated. What cannot be written is a warning.
    """
    try:
        _log_outcome(list(trackers), folder, step)
    except OSError as error:
        rank_zero_warn(f"trackers are not told what the run has measured: {error}")


def _log_outcome(trackers: list[Tracker], folder: RunFolder, step: int) -> None:
    if not trackers:
        return
    throughput = folder.tracking / "throughput.csv"
    rows = read_json(folder.throughput).get("by_context_length", [])
    if rows:
        _write_csv(throughput, rows)
    memory = folder.tracking / "memory.csv"
    phases = read_json(folder.memory()).get("phases", {})
    if phases:
        _write_csv(memory, [{"phase": name, **record} for name, record in phases.items()])
    for tracker in trackers:
        for tag, file in (("loss", folder.loss_curve), ("memory", folder.memory_plot())):
            if file.is_file():
                tracker.log_picture(f"run/{tag}", file, step)
        for tag, table in (("throughput", throughput), ("memory", memory)):
            if table.is_file():
                tracker.log_csv(f"run/{tag}_table", table, step)


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Plain values alone; a row may lack a column."""
    plain = [
        {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(plain)
