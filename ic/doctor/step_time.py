"""How long the steps of a run take."""

from __future__ import annotations

from ic.files.results import read_json
from ic.files.run_folder import RunFolder


def longest_step(run: RunFolder) -> float:
    """Seconds that nine in ten steps keep to, at the context length where they take longest.

    Raises:
        ValueError: no run has measured its steps there.
    """
    lengths = read_json(run.throughput).get("by_context_length", [])
    times = [row["step_time_p90_s"] for row in lengths if "step_time_p90_s" in row]
    if not times:
        raise ValueError(
            f"run={run.path}: {run.throughput.name} there tells of no timed step; give the folder "
            "of a run that was trained with callbacks.throughput"
        )
    return float(max(times))
