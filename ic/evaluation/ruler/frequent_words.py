"""Frequent words: RULER's freq_words_extraction.py, coded words whose counts follow a zeta law."""

from __future__ import annotations

import math
import string

import numpy as np

from ic.evaluation.ruler.task import Draw, Prompt, Task

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
ANSWER_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
LETTERS = 6
ALPHA = 2
_ZETA_2 = math.pi**2 / 6
# From here on the fourth rank comes more often than the fifth, at any number of units.
_LEAST_UNITS = 53


class FrequentWords(Task):
    """The three most frequent coded words, dots aside; rank r comes units / r^2 / zeta(2) times."""

    tokens_to_generate = 50

    def least_units(self, index: int) -> int:
        return _LEAST_UNITS

    def prompt(self, draw: Draw, units: int) -> Prompt:
        num_words = max(5, (draw.length_tokens - self.tokens_to_generate) // 50)
        words: set[str] = set()
        while len(words) < num_words:
            words.add(_coded_word(draw))
        ranked = sorted(words)
        draw.shuffle(ranked)
        ranked[0] = "..."  # the most frequent is noise
        counts = (units * np.arange(1.0, num_words + 1) ** -ALPHA / _ZETA_2).astype(int)
        coded = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        draw.shuffle(coded)
        text = TEMPLATE.format(context=" ".join(coded))
        return Prompt(text, ANSWER_PREFIX, ranked[1:4], " " + ", ".join(ranked[1:4]))


def _coded_word(draw: Draw) -> str:
    return "".join(draw.words.choices(string.ascii_lowercase, k=LETTERS))
