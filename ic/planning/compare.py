"""Predicted against measured memory, for the runs of a `scaling` results file; needs no GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ic.config.compose import compose_config
from ic.files.results import read_json, write_results
from ic.planning.options import PlanConfig
from ic.planning.plan import Planner
from ic.planning.report import comparison_table

COMPARISON_FILE = "plan-scaling.json"


def compare_with_scaling(config: PlanConfig) -> int:
    """Predict every measured row of the files, show the table, write it.

    Raises:
        ValueError: a file that is missing or not of `scaling`.
    """
    rows = [
        {"source": Path(file).name, **row}
        for file in config.plan.compare
        for row in compare_file(Path(file))
    ]
    output = config.plan.output_file(COMPARISON_FILE)
    write_results(output, asdict(config.plan), rows, public=True)
    Console().print(comparison_table(rows))
    return 0


def compare_file(path: Path) -> list[dict[str, Any]]:
    """A row for each measured row of a `scaling` results file, with prediction and error.

    Raises:
        ValueError: no such file, or another verb's.
    """
    data = read_json(path)
    rows = [row for row in data.get("rows", []) if row.get("status") == "measured"]
    if not rows or "peak_bytes_per_gpu" not in rows[0]:
        raise ValueError(
            f"plan.compare: {path} holds no measured runs of `scaling`; give files that "
            "python -m ic scaling wrote"
        )
    return [_compare(row, data["commit"]) for row in rows]


def _compare(row: dict[str, Any], commit: str) -> dict[str, Any]:

    devices = row["num_gpus"]
    case, _ = compose_config("plan", PlanConfig, row["overrides"])
    planner = Planner(case)
    predicted = planner.training(*planner.batch_shape()).total_bytes
    measured = row["peak_bytes_per_gpu"]
    return {
        "case": f"{row['name']}, {devices} GPU{'s' if devices > 1 else ''}",
        "device_name": row["device"],
        "overrides": row["overrides"],
        "measured_commit": commit,
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": measured,
        "error_share": predicted / measured - 1,
    }
