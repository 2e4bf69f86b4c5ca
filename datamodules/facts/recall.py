"""A sentence of the haystack and its ending, asked for with the very words that stand before it.

No form is held out here, for there is none: what followed the same words before follows again. The
ending is a key, or the sentence's own next words.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ic.datamodules.facts.key_shapes import held_out_shape
from ic.datamodules.facts.keys import draw_key
from ic.datamodules.facts.words import draw_word

OWN_WORDS = "own-words"  # in place of a kind of key
_OWN_SHARE = 1 / 3
_LEAST_BEFORE, _MOST_BEFORE = 4, 16  # words that are repeated
_LEAST_OWN, _MOST_OWN = 3, 12  # words of the sentence's own ending
_MOST_CHARACTERS = 240  # of either; a line of a table or of base64 may be one long word
_MOST_DRAWS = 50


class Sentences(Protocol):
    """The haystack of a row, as far as an exercise needs it."""

    def draw(self) -> str:
        """A sentence such as the haystack's, but one that need not be in it."""

    def holds(self, text: str) -> bool:
        """Whether the haystack has the text, but for its first word."""


@dataclass(frozen=True)
class Recall:
    """Words, and what follows them once in the text; `kind`: of the key, or `OWN_WORDS`."""

    before: str
    ending: str
    kind: str

    @property
    def text(self) -> str:
        return f"{self.before} {self.ending}."


def draw_recall(
    rng: np.random.Generator,
    split: str,
    sentences: Sentences,
    others: Collection[Recall],
    key_families: Collection[str],
    most: int,
) -> Recall:
    """The beginning of a sentence with a key behind it, or its own words.

    Args:
        others: those of the same text already. What is asked for follows its words once, as far as
            these and the haystack tell; a statement or a question may have them by chance.
        most: how many words may be repeated, if more than the least.
    """
    is_own = rng.random() < _OWN_SHARE
    most_before = max(_LEAST_BEFORE, min(_MOST_BEFORE, most))
    for _ in range(_MOST_DRAWS):
        cut = _cut(rng, sentences.draw(), is_own, most_before)
        if cut and is_own and held_out_shape(cut[1]):
            continue  # three words, say, as the keys of the test
        if cut and not sentences.holds(cut[0]):
            key = None if is_own else draw_key(rng, split, families=key_families)
            recall = Recall(*cut, OWN_WORDS) if key is None else Recall(cut[0], key.text, key.kind)
            if not any(o.before in recall.text or recall.before in o.text for o in others):
                return recall
    # The text has no sentence of so many words, or repeats itself all the time.
    drawn = " ".join(draw_word(rng, split) for _ in range(most_before))
    key = draw_key(rng, split, families=key_families)
    return Recall(drawn.capitalize(), key.text, key.kind)


def _cut(
    rng: np.random.Generator, sentence: str, is_own: bool, most_before: int
) -> tuple[str, str] | None:
    """The words to repeat and those behind them; None if there are too few."""
    words = re.findall(r"\S+\s*", sentence)
    least_behind = _LEAST_OWN if is_own else 1
    most = min(most_before, len(words) - least_behind)
    if most < _LEAST_BEFORE or "\ufffd" in sentence:
        return None
    count = int(rng.integers(_LEAST_BEFORE, most + 1))
    length = int(rng.integers(_LEAST_OWN, _MOST_OWN + 1))
    before = "".join(words[:count]).strip()
    # The full stop that ends every answer takes the place of the sentence's own signs.
    behind = re.sub(r"\W+$", "", "".join(words[count : count + length]))
    if max(len(before), len(behind)) > _MOST_CHARACTERS or (is_own and not behind):
        return None
    return before, behind
