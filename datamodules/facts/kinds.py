"""A kind of key or entity: its name, family and split, and how one is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from ic.datamodules.facts.splits import check_split, draw_of_split, pick

# Draws a text for a split.
Make = Callable[[np.random.Generator, str], str]


@dataclass(frozen=True)
class Kind:
    """What kind of text it is.

    Attributes:
        name: by which it is asked for.
        family: kinds that look alike; a family is drawn first, then one of its kinds.
        split: the split that may draw it; a kind of training serves the other splits too, which
            then draw texts of their own.
        make: draws a text of a split.
    """

    name: str
    family: str
    split: str
    make: Make


def hashed(make: Callable[[np.random.Generator], str]) -> Make:
    """Draws again until the text as a whole belongs to the split."""
    return lambda rng, split: draw_of_split(rng, split, make)


@cache
def own_kinds(kinds: tuple[Kind, ...], split: str) -> tuple[Kind, ...]:
    """The kinds that are a split's own."""
    check_split(split)
    return tuple(kind for kind in kinds if kind.split == split)


@cache
def open_kinds(kinds: tuple[Kind, ...], split: str) -> tuple[Kind, ...]:
    """The kinds that a split may draw: its own and training's."""
    check_split(split)
    return tuple(kind for kind in kinds if kind.split in ("train", split))


def draw_kind(rng: np.random.Generator, kinds: tuple[Kind, ...]) -> Kind:
    """One of the kinds; each family is as likely."""
    return pick(rng, pick(rng, _families(kinds)))


@cache
def _families(kinds: tuple[Kind, ...]) -> tuple[tuple[Kind, ...], ...]:
    names = dict.fromkeys(kind.family for kind in kinds)
    return tuple(tuple(kind for kind in kinds if kind.family == name) for name in names)


def named_kind(kinds: tuple[Kind, ...], split: str, name: str, what: str) -> Kind:
    """The kind of a name.

    Raises:
        ValueError: there is none of that name, or it is held out for another split.
    """
    allowed = {kind.name: kind for kind in open_kinds(kinds, split)}
    if name not in allowed:
        held_out = any(kind.name == name for kind in kinds)
        reason = f"held out from split={split!r}" if held_out else "unknown"
        raise ValueError(f"{what}={name!r} is {reason}; choose from {', '.join(allowed)}")
    return allowed[name]


def characters(alphabet: str, length: int) -> Make:
    """That many characters, each drawn from the alphabet."""
    return hashed(partial(draw_characters, alphabet=alphabet, length=length))


def draw_characters(rng: np.random.Generator, alphabet: str, length: int) -> str:
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))
