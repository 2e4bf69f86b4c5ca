"""The tests of an experiment: their figures against independent ones, and how often they are wrong
when somebody looks after every request.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import integrate, stats

from ic.serving.ab.betting import _STAKES, ShareTest
from ic.serving.ab.sequential import difference, paths
from ic.serving.ab.simulate import Experiments, simulate_differences, simulate_guardrail

# 2,000 requests of 1,000 users, and a look after each: three seconds on one core.
CALM = Experiments(experiments=1000, requests=2000, users=1000, base=0.7, spread=0.15, seed=0)


def test_a_path_is_the_ratio_s_variance_at_every_place() -> None:
    """Against the definition, user by user, at every place of a short stream."""
    draw = np.random.default_rng(0)
    users, second = draw.integers(0, 9, 60), draw.random(60) < 0.4
    values = draw.normal(3, 1, 60)
    for found, mine in zip(paths(users, values, second), (~second, second), strict=True):
        for end in range(1, 61):
            of: dict[int, list[float]] = {}
            for user, value in zip(users[:end][mine[:end]], values[:end][mine[:end]], strict=True):
                of.setdefault(int(user), []).append(float(value))
            n = sum(map(len, of.values()))
            assert (found.users[end - 1], found.requests[end - 1]) == (len(of), n)
            if len(of) < 2:
                assert math.isinf(found.variance[end - 1])
                continue
            mean = sum(map(sum, of.values())) / n
            squares = sum((sum(each) - mean * len(each)) ** 2 for each in of.values())
            variance = len(of) / (len(of) - 1) * squares / n**2
            assert found.mean[end - 1] == pytest.approx(mean)
            assert found.variance[end - 1] == pytest.approx(variance)


def test_one_request_per_user_has_the_variance_of_a_mean() -> None:
    values = np.random.default_rng(1).random(200)
    _, second = paths(np.arange(200), values, np.ones(200, dtype=bool))
    assert second.variance[-1] == pytest.approx(values.var(ddof=1) / 200)


def test_the_interval_is_where_the_mixture_refutes() -> None:
    """The martingale, integrated over the effect numerically, is 1 / alpha at the interval's end;
    p is its inverse.
    """
    draw = np.random.default_rng(2)
    second = draw.random(600) < 0.5
    values = draw.normal(0, 1, 600) + 0.4 * second
    effect, alpha = 0.3, 0.05
    first, other = paths(np.arange(600), values, second)
    found = difference(first, other, effect=effect, alpha=alpha)

    def mixture(estimate: float, variance: float) -> float:
        def ratio(theta: float) -> float:
            log = (theta * estimate - theta**2 / 2) / variance
            return math.exp(log) * stats.norm.pdf(theta, 0, effect)

        return integrate.quad(ratio, -10 * effect, 10 * effect, points=[0, estimate])[0]

    for place in (250, 599):
        variance = float(first.variance[place] + other.variance[place])
        assert mixture(float(found.half_width[place]), variance) == pytest.approx(
            1 / alpha, rel=1e-6
        )
        expected = min(1.0, 1 / mixture(float(found.value[place]), variance))
        assert found.p[place] == pytest.approx(expected, rel=1e-6)
    assert np.isinf(found.half_width[:60]).all()  # too few users


def test_1000_experiments_without_a_difference_watched_all_the_time() -> None:
    row = simulate_differences(CALM, 0.0, effect=0.05, alpha=0.05)
    assert row["claimed"] <= 0.05
    assert row["claimed"] > 0.005  # it is no test that never speaks
    # The test that is made for one look, of requests for independent ones, is wrong most of the time.
    assert row["claimed_by_one_look_test"] > 0.3


def test_the_power_at_a_stated_effect() -> None:
    """Ten points of difference: nine of ten experiments find them in 2,000 requests."""
    row = simulate_differences(CALM, 0.1, effect=0.1, alpha=0.05)
    assert row["claimed"] >= 0.9
    assert row["missed"] <= 0.05
    assert row["requests_p50"] < 1200


def test_capital_is_the_mean_of_all_gamblers() -> None:
    """Exactly, from each gambler's own bets: who begins at j holds 1 / (j (j + 1))."""
    limit, failed = 0.25, [True, False, False, True, True, False]
    test = ShareTest(limit)
    for n, one in enumerate(failed, 1):
        test.add(one)
        capital = Fraction(0)
        for stake in _STAKES:
            part = Fraction(float(stake)) / Fraction(limit)
            for begins in range(1, n + 1):
                held = Fraction(1, begins * (begins + 1))
                for outcome in failed[begins - 1 : n]:
                    held *= 1 + part * (Fraction(int(outcome)) - Fraction(limit))
                capital += held
            capital += Fraction(1, n + 1)
        assert math.exp(test.log_capital) == pytest.approx(float(capital / len(_STAKES)))


def test_guardrails_of_1000_versions_at_the_limit() -> None:
    row = simulate_guardrail(1000, 2000, 0.05, limit=0.05, alpha=0.01, seed=0)
    assert row["rolled_back"] <= 0.01


@pytest.mark.parametrize(("failing", "most"), [(1.0, 4), (0.5, 20), (0.2, 120)])
def test_the_stated_time_to_roll_back(failing: float, most: int) -> None:
    """What the page on A/B tests states, for 95 of 100 versions."""
    row = simulate_guardrail(1000, 200, failing, limit=0.05, alpha=0.005, seed=0)
    assert row["outcomes_p95"] is not None
    assert row["outcomes_p95"] <= most


def test_a_version_that_fails_after_a_long_while_in_order() -> None:
    test = ShareTest(0.05)
    for _ in range(5000):
        test.add(False)
    after = 0
    while not test.refuted(0.01):
        test.add(True)
        after += 1
    assert after <= 10
