"""Short pieces of writing out of a grammar: no two alike, and none from any model or book.

`words.json` holds the grammar: for each kind of piece sentences to begin with, to go on with and to
end with. `{topic}` in them is what the piece is about, any other name in braces a list of words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

_GRAMMAR = json.loads(Path(__file__).with_name("words.json").read_text())
TOPICS: list[str] = " ".join(_GRAMMAR["topics"]).split()
KINDS: list[str] = list(_GRAMMAR["kinds"])
_WORDS: dict[str, list[str]] = {
    name: " ".join(lines).split() for name, lines in _GRAMMAR["words"].items()
}
_SLOT = re.compile(r"\{(\w+)\}")
_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")


def write_piece(kind: str, topic: str, num_lines: int, rng: np.random.Generator) -> str:
    """A piece such as a poem about tapirs, of at least two lines."""
    sentences = _GRAMMAR["kinds"][kind]
    middle: list[str] = []
    while len(middle) < num_lines - 2:  # each sentence once before any comes again
        middle += [sentences["middle"][i] for i in rng.permutation(len(sentences["middle"]))]
    lines = [_pick(sentences["first"], rng), *islice(middle, num_lines - 2)]
    lines.append(_pick(sentences["last"], rng))
    return "\n".join(_fill(line, topic, rng) for line in lines)


def _fill(line: str, topic: str, rng: np.random.Generator) -> str:
    def word(slot: re.Match[str]) -> str:
        return topic if slot[1] == "topic" else _pick(_WORDS[slot[1]], rng)

    return _A_BEFORE_VOWEL.sub(r"\1n ", _SLOT.sub(word, line))


def _pick(values: Sequence[str], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]
