"""A small suite: a word at the end of a line of dots, to be written once more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Config:
    """Options of the suite."""

    lengths: list[int] = field(default_factory=lambda: [32, 64])
    letters: list[int] = field(default_factory=lambda: [2, 4])
    samples: int = 3
    seed: int = 0

    def cells(self) -> Iterator[Cell]:
        for length in self.lengths:
            for letters in self.letters:
                yield Cell(letters, length, self.samples)


@dataclass(frozen=True)
class Cell:
    """Words of `letters` letters behind enough dots."""

    letters: int
    length_tokens: int
    samples: int
