"""How often the method is wrong, and how soon it is right: experiments whose truth is known.

Every simulated experiment is looked at after each of its requests. Users send several requests,
whose outcomes resemble each other. Beside the method stands what is often done instead: a test that
is made for one look.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ic.serving.ab.betting import ShareTest
from ic.serving.ab.sequential import MIN_USERS, difference, paths

# Experiments that are followed at once: what fits into a few hundred megabytes.
_AT_ONCE = 250


@dataclass(frozen=True)
class Experiments:
    """Simulated experiments of two versions.

    Attributes:
        experiments: how many.
        requests: of each, of both versions together.
        users: of each; half of them have each version.
        base: share of answers of the first version.
        spread: standard deviation of that share from user to user.
    """

    experiments: int
    requests: int
    users: int
    base: float
    spread: float
    seed: int


def simulate_differences(
    of: Experiments, true_difference: float, *, effect: float, alpha: float
) -> dict[str, Any]:
    """How many experiments claim a difference at any time, and after how many requests.

    Returns:
        A row: `claimed`, the share that claims one at any look; `claimed_by_one_look_test`, the
        share in which a z test of independent requests at the same level would at any look;
        `missed`, the share whose interval at any look lacks the true difference; `requests_p50`
        until the claim, null where fewer than half claim any.
    """
    one_look = NormalDist().inv_cdf(1 - alpha / 2)
    claims, naive, missed = 0, 0, 0
    when: list[int] = []
    for begin in range(0, of.experiments, _AT_ONCE):
        number = min(_AT_ONCE, of.experiments - begin)
        draw = np.random.default_rng((of.seed, begin))
        users = draw.integers(0, of.users, (number, of.requests))
        version = draw.random((number, of.users)) < 0.5
        likes = draw.normal(0, of.spread, (number, of.users))
        second = np.take_along_axis(version, users, -1)
        share = of.base + true_difference * second + np.take_along_axis(likes, users, -1)
        values = (draw.random(share.shape) < share).astype(np.float64)
        first_path, second_path = paths(users, values, second)
        found = difference(first_path, second_path, effect=effect, alpha=alpha)
        claimed = np.abs(found.value) > found.half_width
        claims += int(claimed.any(-1).sum())
        missed += int((np.abs(found.value - true_difference) > found.half_width).any(-1).sum())
        when += (claimed.argmax(-1) + 1)[claimed.any(-1)].tolist()
        enough = np.minimum(first_path.users, second_path.users) >= MIN_USERS
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.abs(found.value) / np.sqrt(
                sum(
                    each.mean * (1 - each.mean) / each.requests
                    for each in (first_path, second_path)
                )
            )
        naive += int((enough & (z > one_look)).any(-1).sum())
    number = of.experiments
    return {
        "what": "difference",
        "true_difference": true_difference,
        "experiments": number,
        "requests": of.requests,
        "users": of.users,
        "claimed": claims / number,
        "missed": missed / number,
        "claimed_by_one_look_test": naive / number,
        "requests_p50": float(np.sort(when)[number // 2]) if len(when) > number // 2 else None,
    }


def simulate_guardrail(
    experiments: int, outcomes: int, share: float, *, limit: float, alpha: float, seed: int
) -> dict[str, Any]:
    """How many versions whose outcomes fail with probability `share` a guardrail takes out.

    Returns:
        A row: `rolled_back`, the share of them, and how many outcomes that took, `outcomes_p50`
        and `outcomes_p95`, null where fewer than so many are rolled back.
    """
    draw = np.random.default_rng((seed, 1))
    test = ShareTest(limit, (experiments,))
    after = np.full(experiments, np.inf)
    for n in range(1, outcomes + 1):
        test.add(draw.random(experiments) < share)
        after[test.refuted(alpha) & np.isinf(after)] = n
        if np.isfinite(after).all():
            break
    middle, late = (np.quantile(after, q, method="higher") for q in (0.5, 0.95))
    return {
        "what": "guardrail",
        "failing": share,
        "limit": limit,
        "experiments": experiments,
        "outcomes": outcomes,
        "rolled_back": float(np.isfinite(after).mean()),
        "outcomes_p50": float(middle) if np.isfinite(middle) else None,
        "outcomes_p95": float(late) if np.isfinite(late) else None,
    }
