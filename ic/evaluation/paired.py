"""Two models on the same samples: how far apart they are, and how sure that is.

Source: B. Efron, "Better Bootstrap Confidence Intervals" (1987), for the interval; R. A. Fisher's
permutation of signs, for the probability; S. Holm, "A Simple Sequentially Rejective Multiple Test
Procedure" (1979), for many comparisons at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ic.evaluation.statistics import wilson_interval

RESAMPLES = 9999


@dataclass(frozen=True)
class PairedDifference:
    """Scores of two models on the same samples.

    Attributes:
        n: samples.
        first, second: their mean scores.
        low_95, high_95: 95 % interval of `difference`.
        p: probability of a difference at least as large if the two models did not differ.
    """

    n: int
    first: float
    second: float
    low_95: float
    high_95: float
    p: float

    @property
    def difference(self) -> float:
        """Mean score of the second less that of the first."""
        return self.second - self.first


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """Compare scores of the same samples in the same order, each in [0, 1].

    The interval is the paired bootstrap's, `bootstrap_interval` of the differences.

    The probability is `exchange_probability`. If all scores are 0 or 1 it is McNemar's exact test.

    Args:
        seed: of the resampling.
        resamples: of the bootstrap, and the most exchanges of shares that are tried.

    Raises:
        ValueError: no samples, unequal numbers of them, or a score outside of [0, 1].
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} scores: need as many of both, at least one")
    both = np.concatenate([a, b])
    if not (np.isfinite(both).all() and both.min() >= 0 and both.max() <= 1):
        raise ValueError(f"scores from {both.min():g} to {both.max():g}: must be in [0, 1]")
    differences = b - a
    low, high = bootstrap_interval(
        differences, least=-1.0, most=1.0, seed=seed, resamples=resamples
    )
    p = exchange_probability(differences, seed=seed, resamples=resamples)
    return PairedDifference(len(a), float(a.mean()), float(b.mean()), low, high, p)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    least: float,
    most: float,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """95 % interval of a mean by the bootstrap, bias-corrected and accelerated.

    Where all values are the same, as where both models answer everything, resampling shows no
    spread at all. There it is the interval that holds if as many values are others as Wilson's
    bound allows.

    Args:
        values: at least one.
        least, most: between which a value lies; infinite where values have no bounds and are not
            all the same.
    """
    n, common = len(values), float(values[0])
    if np.ptp(values) == 0:
        _, unseen = wilson_interval(0, n)  # share of values that may be others
        seen = (1 - unseen) * common
        return seen + unseen * least, seen + unseen * most
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, vectorized=True, n_resamples=resamples, batch=1000, rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities adjusted for being many, in their order: those below 0.05 are, all together,
    wrong at most once in twenty times.
    """
    adjusted = [0.0] * len(probabilities)
    largest = 0.0
    in_order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    for place, index in enumerate(in_order):
        largest = max(largest, min(1.0, (len(in_order) - place) * probabilities[index]))
        adjusted[index] = largest
    return adjusted


def exchange_probability(
    differences: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Probability of a mean at least as far from 0 if each difference could as well have the other
    sign.

    It comes from exchanging the two values of a sample, in every way that there is, or in
    `resamples` random ones where there are more and the differences are of several sizes. Samples
    whose values are equal do not count for it.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    if len(set(np.abs(differences))) == 1:  # every exchange is counted by a coin's distribution
        positive = int((differences > 0).sum())
        return float(stats.binomtest(positive, len(differences)).pvalue)
    return float(
        stats.permutation_test(
            (differences,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=1000,
            rng=seed,
        ).pvalue
    )
