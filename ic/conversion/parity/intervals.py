"""Columns of a results row for a mean of independent values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ic.evaluation.statistics import mean_interval


def mean_columns(name: str, values: Sequence[float], most: float = math.inf) -> dict[str, Any]:
    """The mean of values from 0 to `most` and Student's 95 % interval of it, null for one value."""
    low, high = mean_interval(values) or (None, None)
    return {
        name: math.fsum(values) / len(values),
        f"{name}_low_95": None if low is None else max(0.0, low),
        f"{name}_high_95": None if high is None else min(most, high),
    }
