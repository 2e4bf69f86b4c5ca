"""How many units of haystack fit: a search that makes few prompts, each the length of the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

_INTERPOLATIONS = 12


class Sized(Protocol):
    """Something that takes `tokens`."""

    @property
    def tokens(self) -> int: ...


M = TypeVar("M", bound=Sized)


class TooShortError(ValueError):
    """Not even the least number of units fits; `tokens` is what that takes."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


def largest_that_fits(
    make: Callable[[int], M], least: int, room: int, guess: int | None = None
) -> tuple[int, M]:
    """So many units that one more would not fit, and what was made of them.

    RULER bisects; here the search goes where a straight line through what is known would be full,
    because prompts are nearly as long as their units, and long ones take seconds to make. It ends
    where less is left than an average unit takes, or a ten-thousandth of the room.

    Args:
        make: what has so many units; more units take more tokens.
        least: smallest number of units.
        room: tokens that may be taken.
        guess: where to look first.

    Raises:
        TooShortError: `least` units take more.
    """
    low, best = least, make(least)
    if best.tokens > room:
        raise TooShortError(best.tokens)
    fixed, high, over, made = best.tokens, 0, 0, 0
    while not high or high - low > 1:
        if high:
            tokens_per_unit = (over - best.tokens) / (high - low)
        elif low > least:
            tokens_per_unit = (best.tokens - fixed) / (low - least)
        else:
            tokens_per_unit = best.tokens / least  # too many, with all that is no unit
        left = room - best.tokens
        if low > least and left < max(tokens_per_unit, room / 10_000):
            break
        units = low + max(1, int(left / max(tokens_per_unit, 1e-6)))
        if made > _INTERPOLATIONS:
            units = (low + high) // 2 if high else 2 * low
        elif not made:  # a short one, to learn what a unit takes
            units = guess if guess is not None and guess > low else low + (units - low + 15) // 16
        # Units may add nothing for a while, which would look as if any number of them fitted.
        units = min(units, high - 1 if high else 64 * low)
        made += 1
        found = make(units)
        if found.tokens <= room:
            low, best = units, found
        else:
            high, over = units, found.tokens
    return low, best
