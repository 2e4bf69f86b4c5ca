"""Shares of users: exact, sticky, and moved no more than they must."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ic.errors import UsageError
from ic.serving.ab.split import SLOTS, Split, check_weights, slot_of

USERS = [f"user {n}" for n in range(20_000)]


def owners(split: Split) -> list[str]:
    return [split.version_at(slot) for slot in range(SLOTS)]


def moved(before: Split, after: Split) -> float:
    """Share of slots with another version."""
    return sum(a != b for a, b in zip(owners(before), owners(after), strict=True)) / SLOTS


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 50.0, "b": 40.0}, "a 50, b 40 sum to 90 per cent; they must sum to 100"),
        ({"a": 100.0}, "at least two versions"),
        ({"a": 110.0, "b": -10.0}, "from 0 to 100"),
        ({"a": float("nan"), "b": 100.0}, "from 0 to 100"),
        ({"a": 33.333, "b": 66.667}, "at most two decimals"),
    ],
)
def test_weights_that_are_none(weights: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_weights("weights", weights)


def test_users_are_dealt_out_by_weight() -> None:
    split = Split.of({"a": 90.0, "b": 9.5, "c": 0.5})
    assert split.weights == {"a": 90.0, "b": 9.5, "c": 0.5}
    found = [split.version_at(slot_of("x", user)) for user in USERS]
    for version, weight in split.weights.items():
        expected = len(USERS) * weight / 100
        assert abs(found.count(version) - expected) < 5 * expected**0.5
    # Another experiment deals anew: of those who have b, as many as of all have it again.
    of_b = [user for user, version in zip(USERS, found, strict=True) if version == "b"]
    again = sum(split.version_at(slot_of("y", user)) == "b" for user in of_b)
    assert abs(again - 0.095 * len(of_b)) < 5 * (0.095 * len(of_b)) ** 0.5


@pytest.mark.parametrize(
    "steps",
    [
        [{"a": 99, "b": 1}, {"a": 90, "b": 10}, {"a": 50, "b": 50}, {"a": 70, "b": 30}],
        [{"a": 50, "b": 30, "c": 20}, {"a": 40, "b": 30, "c": 30}, {"a": 0, "b": 10, "c": 90}],
        [{"a": 100, "b": 0, "c": 0}, {"a": 34, "b": 33, "c": 33}, {"a": 100, "b": 0, "c": 0}],
    ],
)
def test_only_the_share_that_must_moves(steps: list[dict[str, float]]) -> None:
    splits = [Split.of(steps[0])]
    splits += [splits[-1].changed(weights) for weights in steps[1:]][:1]
    for weights in steps[2:]:
        splits.append(splits[-1].changed(weights))
    for (before, after), (old, new) in zip(pairwise(splits), pairwise(steps), strict=True):
        assert after.weights == new
        must = sum(max(0.0, new[version] - old[version]) for version in new) / 100
        assert moved(before, after) == pytest.approx(must, abs=1e-9)
        kept = [v for v in new if new[v] >= old[v]]  # who grows loses nobody
        for a, b in zip(owners(before), owners(after), strict=True):
            assert a == b or a not in kept


def test_two_versions_do_not_depend_on_the_past() -> None:
    """So several routers, begun at different times, agree."""
    wandered = Split.of({"a": 10, "b": 90})
    for weight in (80, 20.5, 55, 0, 99):
        wandered = wandered.changed({"a": weight, "b": 100 - weight})
        assert wandered.ranges == Split.of({"a": weight, "b": 100 - weight}).ranges


def test_other_versions_are_refused() -> None:
    with pytest.raises(UsageError, match="the versions are a, b"):
        Split.of({"a": 50, "b": 50}).changed({"a": 50, "c": 50})
