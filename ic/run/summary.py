"""Rows of a training run's results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ic.files.results import read_json
from ic.files.run_folder import RunFolder


def run_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Throughput by context length, and peak memory."""
    rows: list[dict[str, Any]] = []
    run = RunFolder(run_dir)
    throughput = read_json(run.throughput)
    for entry in throughput.get("by_context_length", []):
        rows.append({"what": "training", **entry})
    memory = read_json(run.memory())
    if memory:
        rows.append(
            {"what": "memory", "meter": memory["meter"], "peak_bytes": memory["run_peak_bytes"]}
        )
    return rows
