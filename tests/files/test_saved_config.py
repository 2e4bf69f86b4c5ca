"""What of a saved configuration is a change, and what only another version."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import yaml

from ic.files.saved_config import MAY_CHANGE, changed_keys, forgotten_keys


@dataclass
class Part:
    rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    workers: int = field(default=0, metadata=MAY_CHANGE)
    weights: dict[str, float] = field(default_factory=lambda: {"single": 1.0, "pair": 0.0})


@dataclass
class Shown:
    every: int = 10


@dataclass
class Options:
    part: Part = field(default_factory=Part)
    other: Part | None = None
    shown: Shown = field(default_factory=Shown, metadata=MAY_CHANGE)
    seed: int = 0
    given: str = field(default="a", metadata=MAY_CHANGE)


def saved(options: Options | None = None) -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_dump(asdict(options or Options()), sort_keys=False))


def test_the_same_is_no_change() -> None:
    options = Options(part=Part(rate=0.1), other=Part(workers=3), seed=4)
    assert list(changed_keys(saved(options), options)) == []
    assert list(forgotten_keys(saved(options), options)) == []


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (Options(seed=3), ["seed: 0 -> 3"]),
        (Options(part=Part(rate=0.1, workers=2)), ["part.rate: 0.5 -> 0.1"]),
        (Options(part=Part(betas=(0.9, 0.99))), ["part.betas: [0.9, 0.95] -> [0.9, 0.99]"]),
        (
            Options(part=Part(weights={"single": 1.0, "triple": 0.5})),
            ["part.weights.pair: 0.0 -> (absent)", "part.weights.triple: (absent) -> 0.5"],
        ),
        (Options(shown=Shown(3), given="b"), []),
    ],
)
def test_changes_are_named_unless_the_field_allows_them(
    options: Options, changes: list[str]
) -> None:
    assert list(changed_keys(saved(), options)) == changes


def test_a_part_switched_on_or_off_is_a_change() -> None:
    (on,) = changed_keys(saved(), Options(other=Part()))
    assert on == "other: null -> {4 keys}"
    (off,) = changed_keys(saved(Options(other=Part())), Options())
    assert off == "other: {4 keys} -> null"


def test_a_key_that_came_later_had_its_default() -> None:
    earlier = saved()
    del earlier["seed"], earlier["part"]["rate"], earlier["part"]["weights"]["pair"]
    del earlier["given"], earlier["other"]
    assert list(changed_keys(earlier, Options())) == []
    # A part that did not exist then, on by now with its defaults.
    assert list(changed_keys(earlier, Options(other=Part()))) == []
    now = Options(Part(rate=0.25, weights={"single": 1.0, "pair": 0.5}), Part(rate=2.0), seed=1)
    assert list(changed_keys(earlier, now)) == [
        "part.rate: 0.5 -> 0.25",
        "part.weights.pair: 0.0 -> 0.5",
        "other.rate: 0.5 -> 2.0",
        "seed: 0 -> 1",
    ]


def test_keys_that_are_gone_are_named_and_are_no_change() -> None:
    earlier = saved(Options(other=Part()))
    earlier |= {"gone": {"a": 1}}
    earlier["part"]["momentum"] = 0.9
    earlier["other"]["momentum"] = 0.8
    earlier["shown"]["colour"] = "red"  # of a part that may change: nobody need know
    now = Options(other=Part())
    assert list(changed_keys(earlier, now)) == []
    assert list(forgotten_keys(earlier, now)) == [
        "gone={'a': 1}",
        "part.momentum=0.9",
        "other.momentum=0.8",
    ]
