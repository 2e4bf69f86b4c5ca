"""Whether a share is above a limit, decided outcome by outcome: what a guardrail asks.

A gambler bets on failures at odds that are fair if their share is the limit. If it is the limit or
less, the capital is a supermartingale: it ever reaches 1 / alpha with probability alpha at most,
after any number of looks and of outcomes, even of few (Waudby-Smith and Ramdas, "Estimating Means
of Bounded Random Variables by Betting", 2023; Ville, 1939). Nothing is assumed but that no outcome
fails with more than that probability, given those before it.

A version may fail after a long while in order, when a gambler who played from the start has lost
all. So the capital is spread over gamblers who begin at every outcome, with 1 / (j (j + 1)) of it
for the j-th, and over several stakes: a mixture of martingales is one. It costs a few more
failures, as many more as log(j) asks for.
"""

from __future__ import annotations

import numpy as np

# Shares of the capital that may be staked at most; small ones find small excesses.
_STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.8])


class ShareTest:
    """Refutes that a share is at most `limit`; for one stream, or for many at once.

    Attributes:
        outcomes: seen so far.
        log_capital: natural logarithm of the capital now, per stream.

    Args:
        limit: in (0, 1).
        shape: of the streams.

    Raises:
        ValueError: a limit that is no share between 0 and 1.
    """

    def __init__(self, limit: float, shape: tuple[int, ...] = ()) -> None:
        if not 0 < limit < 1:
            raise ValueError(f"limit={limit}: must be above 0 and below 1")
        self.outcomes = 0
        self._limit = limit
        stakes = _STAKES / limit
        self._if_failed = np.log1p(stakes * (1 - limit))
        self._if_not = np.log1p(-stakes * limit)
        # Of the gamblers that have begun, for each stake.
        self._log_begun = np.full((*shape, len(stakes)), -np.inf)
        self.log_capital = np.zeros(shape)

    def add(self, failed: np.ndarray | bool) -> None:
        """Count the next outcome of each stream."""
        self.outcomes += 1
        j = self.outcomes
        won = np.where(np.asarray(failed)[..., None], self._if_failed, self._if_not)
        joined = np.logaddexp(self._log_begun, -np.log(j * (j + 1.0)))
        self._log_begun = joined + won
        of_stakes = np.logaddexp(
            self._log_begun, -np.log(j + 1.0)
        )  # those still to begin hold 1/(j+1)
        self.log_capital = np.logaddexp.reduce(of_stakes, axis=-1) - np.log(len(_STAKES))

    def refuted(self, alpha: float) -> np.ndarray:
        """Whether the share is above the limit, at a level of `alpha` for all time."""
        return self.log_capital >= -np.log(alpha)
