"""The bounds of what `plan` is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.planning.options import PlanOptions
from tests.bounds import check_bounds


def test_bounds() -> None:
    check_bounds(PlanOptions, "plan.", "num_gpus", [None, 1, 6], [0])
    check_bounds(PlanOptions, "plan.", "context_parallel_size", [None, 1, 3, 6], [0, 4], num_gpus=6)
    with pytest.raises(ValueError, match=r"plan\.output='a\.csv': must end in \.json"):
        PlanOptions(output="a.csv")


def test_where_a_measurement_goes() -> None:
    assert PlanOptions().output_file("plan-memory.json") == Path("runs/plan-memory.json")
    assert PlanOptions(output="x/y.json").output_file("plan-memory.json") == Path("x/y.json")
