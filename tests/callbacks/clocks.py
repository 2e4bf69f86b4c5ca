"""A clock that only the test moves."""

from __future__ import annotations

FETCH_S, COMPUTE_S = 0.5, 1.5
STEP_S = FETCH_S + COMPUTE_S
TOKENS = 2 * 16  # of a step


class Clock:
    """Fetching a batch takes 0.5 s, a training step 1.5 s, and nothing else takes any time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def fetch(self) -> None:
        self.now += FETCH_S

    def compute(self) -> None:
        self.now += COMPUTE_S

    def lose(self) -> None:
        self.now += 1000
