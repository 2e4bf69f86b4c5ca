"""Wilson's interval against the equation that defines it."""

from __future__ import annotations

import math

import pytest

from ic.evaluation.statistics import Z_95, wilson_interval


@pytest.mark.parametrize(("correct", "n"), [(0, 20), (20, 20), (1, 2), (7, 10), (95, 100), (1, 1)])
def test_bounds_solve_the_score_equation(correct: int, n: int) -> None:
    """Each bound p satisfies |p_hat - p| = z sqrt(p (1 - p) / n)."""
    for bound in wilson_interval(correct, n):
        gap = abs(correct / n - bound)
        assert gap == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_known_value() -> None:
    low, high = wilson_interval(20, 20)
    assert low == pytest.approx(0.838875, abs=1e-6)
    assert high == pytest.approx(1.0)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_refuses(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="need 0 <= correct <= n"):
        wilson_interval(correct, n)
