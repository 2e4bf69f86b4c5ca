"""Statistics of success counts and of means, and their columns in a results row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """How many of `n` samples were answered correctly."""

    correct: float
    n: int

    @property
    def share(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.correct, self.n)

    @property
    def columns(self) -> dict[str, float]:
        """What a results row says of it."""
        low, high = self.interval
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.share,
            "low_95": low,
            "high_95": high,
        }

    def __str__(self) -> str:
        return f"{self.correct}/{self.n}"


def pool(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], Accuracy]:
    """Add up `n` and `correct` of the rows that have the same values of `keys`, in their order."""
    sums: dict[tuple[Any, ...], Accuracy] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        before = sums.get(key, Accuracy(0, 0))
        sums[key] = Accuracy(before.correct + row["correct"], before.n + row["n"])
    return sums


def wilson_interval(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; honest at 0 and n of n, unlike the normal one.

    Raises:
        ValueError: n below 1, or correct outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n}: need 0 <= correct <= n and n >= 1")
    p, z2 = correct / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of independent values; None for a single one, which says
    nothing of how others would differ.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no values: need at least one")
    if len(values) == 1:
        return None
    from scipy.stats import t  # half a second to import

    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n)
    return mean - half, mean + half


def mean_columns(name: str, values: Sequence[float], most: float = math.inf) -> dict[str, Any]:
    """What a results row says of a mean of independent values from 0 to `most`: the mean, and
    Student's 95 % interval of it, null for one value.
    """
    low, high = mean_interval(values) or (None, None)
    return {
        name: math.fsum(values) / len(values),
        f"{name}_low_95": None if low is None else max(0.0, low),
        f"{name}_high_95": None if high is None else min(most, high),
    }
