"""Paired comparison: against scipy asked otherwise, and by hand where that is possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ic.evaluation.paired import holm, paired_difference


def test_by_hand() -> None:
    """Three samples, differences 1, 1 and 0.5: of 8 ways to exchange them, 2 are as far apart."""
    found = paired_difference([0, 0, 0], [1, 1, 0.5])
    assert (found.n, found.first, found.second) == (3, 0.0, pytest.approx(2.5 / 3))
    assert found.p == pytest.approx(2 / 8)
    # Each of 27 resamples is equally likely; the smallest mean is 0.5, the largest 1.
    assert 0.5 <= found.low_95 < found.difference < found.high_95 <= 1.0


@pytest.mark.parametrize(("better", "worse", "equal"), [(12, 3, 35), (5, 1, 4), (9, 9, 2)])
def test_right_or_wrong_is_mcnemar_s_exact_test(better: int, worse: int, equal: int) -> None:
    first = [0.0] * better + [1.0] * worse + [1.0] * equal
    second = [1.0] * better + [0.0] * worse + [1.0] * equal
    exact = stats.binomtest(better, better + worse).pvalue
    found = paired_difference(first, second)
    assert found.p == pytest.approx(exact)
    # The definition, which the shares take: the mean's place among exchanges of both scores.
    drawn = stats.permutation_test(
        (np.array(first), np.array(second)),
        lambda a, b, axis: np.mean(b, axis=axis) - np.mean(a, axis=axis),
        permutation_type="samples",
        vectorized=True,
        rng=0,
    ).pvalue
    assert found.p == pytest.approx(drawn, abs=4 * (exact * (1 - exact) / 9999) ** 0.5 + 2e-4)


def test_shares_against_every_exchange_of_signs() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random(9), rng.random(9) * 0.8 + 0.2
    differences = second - first
    means = [
        abs(np.mean(np.multiply(s, differences))) for s in itertools.product((1, -1), repeat=9)
    ]
    exact = np.mean(np.array(means) >= abs(differences.mean()) - 1e-12)
    assert paired_difference(list(first), list(second)).p == pytest.approx(exact)


def test_interval_is_the_paired_bootstrap_of_both_samples() -> None:
    """scipy is given both samples and pairs them itself; another seed, so within its noise."""
    rng = np.random.default_rng(7)
    first = rng.integers(0, 2, 80).astype(float)
    second = np.maximum(first, rng.integers(0, 2, 80)) * rng.choice([1.0, 0.5], 80)
    found = paired_difference(list(first), list(second))
    reference = stats.bootstrap(
        (first, second),
        lambda a, b, axis: np.mean(b, axis=axis) - np.mean(a, axis=axis),
        paired=True,
        vectorized=True,
        rng=99,
    ).confidence_interval
    assert found.low_95 == pytest.approx(reference.low, abs=0.01)
    assert found.high_95 == pytest.approx(reference.high, abs=0.01)
    # And by its definition, without scipy: quantiles of resampled means, near those of BCa here.
    differences = second - first
    means = differences[rng.integers(0, 80, (20_000, 80))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low_95, found.high_95) == (
        pytest.approx(low, abs=0.03),
        pytest.approx(high, abs=0.03),
    )


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(1)
    first, second = list(rng.random(40)), list(rng.random(40))
    assert paired_difference(first, second, seed=3) == paired_difference(first, second, seed=3)
    assert paired_difference(first, second, seed=3) != paired_difference(first, second, seed=4)


def test_where_resampling_shows_no_spread() -> None:
    """Both right 50 times: Wilson allows 7.1 % of samples to be otherwise, in either direction."""
    both = paired_difference([1.0] * 50, [1.0] * 50)
    bound = 1.959963984540054**2 / (50 + 1.959963984540054**2)
    assert both.p == 1.0
    assert (both.low_95, both.high_95) == (pytest.approx(-bound), pytest.approx(bound))
    apart = paired_difference([0.0] * 50, [1.0] * 50)
    assert (apart.low_95, apart.high_95) == (pytest.approx(1 - 2 * bound), 1.0)
    assert apart.p < 0.001
    one = paired_difference([0.0], [1.0])
    assert one.low_95 < 0 < one.high_95 == 1.0
    assert one.p == 1.0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], "at least one"),
        ([1.0], [1.0, 0.0], "1 and 2 scores"),
        ([0.5, 1.5], [1.0, 0.0], "from 0 to 1.5"),
        ([float("nan")], [1.0], r"must be in \[0, 1\]"),
    ],
)
def test_refuses(first: list[float], second: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second)


def test_holm() -> None:
    """The example of R's p.adjust, and that a later one is never surer than an earlier one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.02, 0.8]) == pytest.approx([1.0, 0.06, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_intervals_cover() -> None:
    """Of 200 drawn comparisons with a known difference, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        first = (rng.random(60) < 0.6).astype(float)
        second = np.where(rng.random(60) < 0.3, (rng.random(60) < 0.9), first).astype(float)
        found = paired_difference(list(first), list(second), resamples=999)
        held += found.low_95 <= 0.3 * (0.9 - 0.6) <= found.high_95
    assert 180 <= held <= 198
