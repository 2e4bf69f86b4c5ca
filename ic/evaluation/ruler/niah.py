"""Needles in a haystack: the eight tasks of RULER's niah.py."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np

from ic.datamodules.sentences import split_sentences
from ic.evaluation.ruler.task import Draw, Prompt, Task
from ic.evaluation.ruler.words import word_pairs

TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all "
    "the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]


@dataclass(frozen=True)
class Needles(Task):
    """Numbers or UUIDs hidden under keys, of which some are asked for.

    Attributes:
        haystack: `noise` sentences, other `needle`s, or the `essay`.
        keys, values: what they are: `words`, `numbers` or `uuids`.
        num_keys, num_values, num_queries: needle keys, values of each, and keys asked for.
        essay: the words of the prose; a unit is one of them.
    """

    tokens_to_generate = 128

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    essay: tuple[str, ...] = ()

    def least_units(self, index: int) -> int:
        # Needles go before different lines.
        return 1 if self.haystack == "essay" else self.num_keys * self.num_values

    def prompt(self, draw: Draw, units: int) -> Prompt:
        rng = draw.words
        keys: list[str] = []
        values: list[list[str]] = []
        needles = []
        for _ in range(self.num_keys):
            keys.append(_random(draw, self.keys))
            values.append([])
            for _ in range(self.num_values):
                values[-1].append(_random(draw, self.values))
                needles.append(self._needle(keys[-1], values[-1][-1]))
        draw.shuffle(needles)
        if self.haystack == "essay":
            context = self._in_essay(draw, needles, units)
        else:
            lines = [
                NOISE
                if self.haystack == "noise"
                else self._needle(_random(draw, self.keys), _random(draw, self.values))
                for _ in range(units)
            ]
            places = sorted(rng.sample(range(units), len(needles)), reverse=True)
            for place, needle in zip(places, needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        asked = rng.sample(range(self.num_keys), self.num_queries)
        queries = [keys[i] for i in asked]
        outputs = [value for i in asked for value in values[i]]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if asked[1:] else queries[0]
        template, answer_prefix, kind = TEMPLATE, ANSWER_PREFIX, self.values
        if len(outputs) == 1:
            template, answer_prefix, kind = _singular(template), _singular(answer_prefix), kind[:-1]
        filled = {"type_needle_v": kind, "query": query}
        answer_prefix = answer_prefix.format(**filled)
        text = template.format(context=context, **filled)
        return Prompt(text, answer_prefix, outputs, " " + ", ".join(outputs))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=self.values, key=key, value=value)

    def _in_essay(self, draw: Draw, needles: list[str], units: int) -> str:
        """Between sentences at depths of a grid of 40; a short essay is repeated."""
        repeats, rest = divmod(units, len(self.essay))
        sentences = split_sentences(" ".join([*self.essay * repeats, *self.essay[:rest]]))
        depths = draw.words.sample(_DEPTHS, len(needles))
        places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
        pieces, last = [], 0
        for place, needle in zip(places, needles, strict=True):
            pieces += [" ".join(sentences[last:place]), needle]
            last = place
        return " ".join([*pieces, " ".join(sentences[last:])])


def _singular(template: str) -> str:
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


def _random(draw: Draw, kind: str) -> str:
    if kind == "numbers":
        return str(draw.words.randint(10**6, 10**7 - 1))
    if kind == "words":
        return draw.words.choice(word_pairs())
    return str(uuid.UUID(int=draw.words.getrandbits(128), version=4))
