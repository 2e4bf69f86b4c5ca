"""RULER's words: those of the package wonderwords, alone or as pairs `adjective-noun`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import overload


def _read(kind: str) -> list[str]:
    text = files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text(encoding="utf-8")
    return [line.rstrip() for line in text.splitlines()]


@cache
def single_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, sorted, each once."""
    return tuple(sorted({*_read("noun"), *_read("adjective"), *_read("verb")}))


@cache
def word_pairs() -> WordPairs:
    """Every adjective with every noun: six million."""
    return WordPairs(_read("adjective"), _read("noun"))


class WordPairs(Sequence[str]):
    """`sorted({f"{a}-{n}" for a in adjectives for n in nouns})`, without a string for each.

    Pairs of one adjective follow each other, unless another adjective goes on with a hyphen where
    the first ends (`well`, `well-known`): those are sorted together.
    """

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        nouns = sorted(set(nouns))
        groups: list[list[str]] = []
        for start in sorted(f"{adjective}-" for adjective in set(adjectives)):
            if groups and start.startswith(groups[-1][0]):
                groups[-1].append(start)
            else:
                groups.append([start])
        self._groups = [
            ("", sorted({start + noun for start in group for noun in nouns}))
            if len(group) > 1
            else (group[0], nouns)
            for group in groups
        ]
        self._ends = list(accumulate(len(words) for _, words in self._groups))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        group = bisect_right(self._ends, index)
        start, words = self._groups[group]
        return start + words[index - self._ends[group] + len(words)]
