"""What a RULER task is: prompts of any number of haystack units.

The tasks follow scripts/data/synthetic of NVIDIA/RULER (Apache-2.0) at `COMMIT`, template by
template and draw by draw: a prompt is the one that RULER's script makes from `Draw.seed` with as
many units.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

COMMIT = "c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a"
# Below it RULER makes tasks smaller, so that they fit at all.
FULL_SIZE_TOKENS = 4096


@dataclass(frozen=True)
class Prompt:
    """A question about a long text.

    Attributes:
        text: RULER's `input`, with the question at its end.
        answer_prefix: how the answer begins.
        outputs: strings that are looked for in the answer.
        answer: a right answer as RULER's examples write it, to know how many tokens it takes.
    """

    text: str
    answer_prefix: str
    outputs: list[str]
    answer: str


class Draw:
    """What decides on a prompt, its number of units aside; a prompt uses it up.

    Args:
        seed: RULER's `random_seed`, another for each sample; below 2^32.
        index: number of the sample.
        length_tokens: RULER's `max_seq_length`.

    Attributes:
        words: as Python's module `random` after `random.seed`.
        numbers: as `numpy.random` after `numpy.random.seed`.
    """

    def __init__(self, seed: int, index: int, length_tokens: int) -> None:
        self.seed = seed
        self.index = index
        self.length_tokens = length_tokens
        self.words = random.Random(seed)
        self.numbers = np.random.RandomState(seed)

    def shuffle(self, items: list[str]) -> None:
        """As RULER, with a generator that is seeded anew each time."""
        random.Random(self.seed).shuffle(items)


class Task(ABC):
    """One of the thirteen.

    Attributes:
        tokens_to_generate: as published.
        metric: key of `metrics.METRICS`.
    """

    tokens_to_generate: ClassVar[int]
    metric: ClassVar[str] = "all"

    @abstractmethod
    def least_units(self, index: int) -> int:
        """Of sample `index`: fewer cannot hold what is asked for."""

    @abstractmethod
    def prompt(self, draw: Draw, units: int) -> Prompt:
        """The prompt of a fresh draw with so many units of haystack; more units are more text."""
