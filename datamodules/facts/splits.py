"""Which half of the world a word, a name or a key belongs to: training's, validation's or test's.

A hash of the text decides, so that what is asked for in validation or test was never stated in
training, whoever draws it and in whatever order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ic.datamodules.needle_names import SPLITS

_Item = TypeVar("_Item")
_MOST_DRAWS = 10_000


def split_of(text: str) -> str:
    """The split of a text; case, spaces and punctuation make no difference.

    Of ten texts about eight are training's and one each validation's and test's.
    """
    bare = "".join(character for character in text.casefold() if character.isalnum())
    bucket = zlib.crc32(bare.encode()) % 10
    return SPLITS[bucket + 1] if bucket < 2 else SPLITS[0]


def check_split(split: str) -> None:
    """Raises a ValueError for a split that there is not."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose from {', '.join(SPLITS)}")


def pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    """One of several, each as likely."""
    return items[int(rng.integers(len(items)))]


def draw_of_split(
    rng: np.random.Generator,
    split: str,
    make: Callable[[np.random.Generator], _Item],
    hashed: Callable[[_Item], str | None] = str,
) -> _Item:
    """What `make` draws first that belongs to the split.

    Args:
        hashed: the text of what was drawn that decides; None if it may belong to no split.

    Raises:
        ValueError: nothing of very many draws belongs to the split.
    """
    for _ in range(_MOST_DRAWS):
        item = make(rng)
        text = hashed(item)
        if text is not None and split_of(text) == split:
            return item
    raise ValueError(f"{make} makes nothing that belongs to split={split!r}")
