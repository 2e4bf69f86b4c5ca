"""Rows of a training run's results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ic.evaluation.passkey.heatmap import passkey_rows
from ic.files.results import read_json


def run_rows(run_dir: Path, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a training run: throughput by context length, peak memory, passkey cells."""
    rows: list[dict[str, Any]] = []
    throughput = read_json(run_dir / "throughput.json")
    for entry in throughput.get("by_context_length", []):
        rows.append({"what": "training", **entry})
    memory = read_json(run_dir / "memory" / "memory.json")
    if memory:
        rows.append(
            {"what": "memory", "meter": memory["meter"], "peak_bytes": memory["run_peak_bytes"]}
        )
    return rows + passkey_rows(cells)
