"""The difference of two versions, valid however often one looks.

An always-valid test for the mean of a stream of outcomes, with users as the units: a user has one
version and sends many requests, whose outcomes resemble each other. Taken for independent, they
would make differences of nothing.

- Each version's mean is all outcomes over all requests, and its variance is that of a ratio with
  users as clusters (Deng, Knoblich and Lu, "Applying the Delta Method in Metric Analytics", 2018).
- The difference of two means with variance V has the information 1 / V, in which it is close to a
  Brownian motion (Jennison and Turnbull, "Group Sequential Methods", 1999, chapter 3).
- Robbins' mixture of normal distributions over the effect is a martingale of it, which exceeds
  1 / alpha at any time with probability alpha at most (Robbins, "Statistical Methods Related to the
  Law of the Iterated Logarithm", 1970; Johari, Koomen, Pekelis and Walsh, "Always Valid Inference",
  2022, who call it mSPRT; Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, Nonparametric,
  Nonasymptotic Confidence Sequences", 2021). All effects that it does not refute are a confidence
  sequence, an asymptotic one (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform
  Central Limit Theory and Asymptotic Confidence Sequences", 2024): it wants `MIN_USERS` before it
  speaks. `simulate` shows how often it is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of each version, before a difference is judged: a variance of fewer is not known well enough.
MIN_USERS = 50


@dataclass(frozen=True)
class Path:
    """What is known of one version after each outcome of the stream.

    Attributes:
        users, requests: counted so far, of this version.
        mean: outcome per request; 0 before the first.
        variance: of the mean; infinite while it cannot be told.
    """

    users: np.ndarray
    requests: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def paths(users: np.ndarray, values: np.ndarray, second: np.ndarray) -> tuple[Path, Path]:
    """Follow both versions through a stream of outcomes in the order in which they came.

    Args:
        users: (..., N) integers from 0, the user of each outcome.
        values: (..., N) outcomes.
        second: (..., N) whether the outcome is of the second version.
    """
    key = users * 2 + second  # who moved from one version to the other is a user of both
    if key.max(initial=0) < 2**16:
        key = key.astype(np.uint16)  # which NumPy sorts ten times as fast
    order = np.argsort(key, axis=-1, kind="stable")
    begins = np.ones(key.shape, dtype=bool)
    in_order = np.take_along_axis(key, order, -1)
    begins[..., 1:] = in_order[..., 1:] != in_order[..., :-1]
    place = np.arange(key.shape[-1])
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=-1)
    # Of this user and version before each outcome: how many there were, and their sum.
    before_n, before_s = np.empty(key.shape), np.empty(key.shape)
    np.put_along_axis(before_n, order, (place - first).astype(np.float64), -1)
    sums = np.take_along_axis(values, order, -1).astype(np.float64)
    sums = sums.cumsum(-1) - sums
    np.put_along_axis(before_s, order, sums - np.take_along_axis(sums, first, -1), -1)
    # Steps of the sums over users of squares and products of their outcomes and requests.
    steps = (
        values * (2 * before_s + values),
        before_s + values * before_n + values,
        2 * before_n + 1,
        (before_n == 0).astype(np.float64),
    )
    of_first = _path(values, steps, ~second)
    return of_first, _path(values, steps, second)


def _path(values: np.ndarray, steps: tuple[np.ndarray, ...], mine: np.ndarray) -> Path:
    n, total = mine.cumsum(-1), (values * mine).cumsum(-1)
    ss, sn, nn, users = ((step * mine).cumsum(-1) for step in steps)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(n > 0, total / n, 0.0)
        squares = np.maximum(ss - 2 * mean * sn + mean * mean * nn, 0.0)
        variance = users / (users - 1) * squares / n**2
    known = (users > 1) & (squares > 1e-12 * np.maximum(ss, 1e-300))
    return Path(users, n, mean, np.where(known, variance, np.inf))


@dataclass(frozen=True)
class Difference:
    """The second version's mean less the first's, after each outcome.

    Attributes:
        value: the difference.
        half_width: of the confidence sequence; infinite before `MIN_USERS` of each version.
        p: always-valid: the probability that a difference is refuted so clearly at this or at any
            other time, if there is none.
    """

    value: np.ndarray
    half_width: np.ndarray
    p: np.ndarray


def difference(first: Path, second: Path, *, effect: float, alpha: float) -> Difference:
    """Compare two versions at every time.

    Args:
        effect: the difference at which the sequence is to be narrowest, in units of the outcome. It
            is valid for any; one that is near the true difference finds it soonest.
        alpha: probability of an interval, at any time, without the true difference.

    Raises:
        ValueError: `effect` not above 0, or `alpha` outside (0, 1).
    """
    if not (effect > 0 and 0 < alpha < 1):
        raise ValueError(f"effect={effect}, alpha={alpha}: must be above 0, and between 0 and 1")
    enough = np.minimum(first.users, second.users) >= MIN_USERS
    variance = np.where(enough, first.variance + second.variance, np.inf)
    value = second.mean - first.mean
    prior = effect**2
    known = np.isfinite(variance)
    v = np.where(known, variance, 1.0)
    log_mixture = value**2 * prior / (2 * v * (v + prior)) - np.log1p(prior / v) / 2
    half = np.sqrt(2 * v * (v + prior) / prior * (np.log1p(prior / v) / 2 - np.log(alpha)))
    return Difference(
        value,
        np.where(known, half, np.inf),
        np.where(known, np.minimum(1.0, np.exp(-np.maximum(log_mixture, 0.0))), 1.0),
    )
