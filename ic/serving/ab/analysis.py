"""What an experiment's log tells: for each version and each measure, how it differs from the
control.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ic.serving.ab.outcomes import Log
from ic.serving.ab.sequential import MIN_USERS, difference, paths

# Points of the curves in the picture.
_POINTS = 400


@dataclass(frozen=True)
class Measure:
    """Something that requests are compared by.

    Attributes:
        name: in tables and rows.
        column: its values in a log, NaN where a request has none.
        higher_is_better: as for answers and scores, but not for times.
        ratio: whether it is compared on a logarithmic scale, so that a difference is a ratio.
    """

    name: str
    column: Callable[[Log], np.ndarray]
    higher_is_better: bool
    ratio: bool


MEASURES = (
    Measure("answered", lambda log: log.ok, True, False),
    Measure("first byte", lambda log: log.first_byte_s, False, True),
    Measure("whole answer", lambda log: log.seconds, False, True),
    Measure("score", lambda log: log.score, True, False),
)


@dataclass(frozen=True)
class Compared:
    """One version against the control in one measure.

    Attributes:
        users, requests: of the control, and of the version.
        control, candidate: means; of times the geometric ones, in seconds.
        difference: candidate less control; of times the logarithm of their ratio.
        low, high: its confidence sequence, infinite while there are too few users.
        p: always-valid, and not adjusted for the number of comparisons.
        level: probability that the sequence is ever wrong; a difference is claimed where p is
            below it.
        curve: places in the log, differences and half widths at them.
    """

    measure: Measure
    version: str
    users: tuple[int, int]
    requests: tuple[int, int]
    control: float
    candidate: float
    difference: float
    low: float
    high: float
    p: float
    level: float
    curve: tuple[np.ndarray, np.ndarray, np.ndarray]

    @property
    def enough(self) -> bool:
        """Whether there are users enough to say anything."""
        return min(self.users) >= MIN_USERS and math.isfinite(self.low)

    @property
    def better(self) -> bool | None:
        """Whether the candidate is better than the control; None where that cannot be seen."""
        if not self.enough or self.p >= self.level:
            return None
        return (self.difference > 0) is self.measure.higher_is_better

    @property
    def columns(self) -> dict[str, Any]:
        """A row of the results file; what is not known is null."""
        finite = self.enough
        return {
            "what": "ab",
            "measure": self.measure.name,
            "version": self.version,
            "users": self.users[1],
            "requests": self.requests[1],
            "mean": self.candidate,
            "control_users": self.users[0],
            "control_requests": self.requests[0],
            "control_mean": self.control,
            "difference": self.difference,
            "scale": "log" if self.measure.ratio else "linear",
            "low": self.low if finite else None,
            "high": self.high if finite else None,
            "p": self.p,
            "level": self.level,
            "better": self.better,
        }


def analyse(log: Log, *, effect: float, effect_time: float, alpha: float) -> list[Compared]:
    """Compare every version with the control in every measure that the log has of both.

    Args:
        effect: the difference of shares and scores at which the intervals are narrowest.
        effect_time: the same of times, as a share: 0.1 is a tenth longer.
        alpha: probability that any of the claims is wrong, whenever one looks; the comparisons
            share it evenly.
    """
    found = []
    for index, version in enumerate(log.versions[1:], 1):
        for measure in MEASURES:
            values = measure.column(log)
            chosen = np.isin(log.version, (0, index)) & np.isfinite(values)
            second = log.version[chosen] == index
            if second.any() and not second.all():
                found.append((measure, version, chosen, second))
    level = alpha / max(1, len(found))
    return [
        _compare(log, *each, math.log1p(effect_time) if each[0].ratio else effect, level)
        for each in found
    ]


def _compare(
    log: Log,
    measure: Measure,
    version: str,
    chosen: np.ndarray,
    second: np.ndarray,
    effect: float,
    level: float,
) -> Compared:
    values = measure.column(log)[chosen]
    if measure.ratio:
        values = np.log(np.maximum(values, 1e-6))
    of_control, of_version = paths(log.user[chosen], values, second)
    found = difference(of_control, of_version, effect=effect, alpha=level)
    means = float(of_control.mean[-1]), float(of_version.mean[-1])
    if measure.ratio:
        means = math.exp(means[0]), math.exp(means[1])
    value, half = float(found.value[-1]), float(found.half_width[-1])
    points = np.unique(np.linspace(0, len(values) - 1, _POINTS).astype(int))
    places = np.flatnonzero(chosen)[points] + 1
    return Compared(
        measure,
        version,
        (int(of_control.users[-1]), int(of_version.users[-1])),
        (int(of_control.requests[-1]), int(of_version.requests[-1])),
        *means,
        value,
        value - half,
        value + half,
        float(found.p[-1]),
        level,
        (places, found.value[points], found.half_width[points]),
    )
