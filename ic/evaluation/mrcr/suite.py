"""Ordering: which of several similar pieces was the third?

In the format of OpenAI's MRCR (huggingface.co/datasets/openai/mrcr, MIT): a conversation of
requests ("Write a poem about tapirs") and answers, in which one request comes several times; the
last one asks for one of its answers by its place, with a random word before it. The pieces are
generated (`pieces.py`), and so is each conversation, to the length that is asked for.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.evaluation.by_length import SuiteByLength
from ic.evaluation.framing import encode
from ic.evaluation.mrcr.conversation import Conversation, Turn, end_of_answer
from ic.evaluation.mrcr.grid import Config
from ic.evaluation.mrcr.pieces import KINDS, TOPICS, write_piece
from ic.evaluation.options import TaskCell
from ic.evaluation.suite import Sample, Score

_LETTERS = list(string.ascii_letters + string.digits)
_PREFIX_LETTERS = 10
# So few that every kind meets every topic, and requests other than the asked one come again too.
_TOPICS_OF_A_SAMPLE = 6
# The answer that is cut to fit has at least so many tokens.
_LEAST_CUT = 8
# What a model may write more than the answer, which then counts against it.
_SPARE_TOKENS, _ROUND_TOKENS = 8, 32
# Of a cell, so that a check takes moments.
_CHECKED_SAMPLES = 100


@dataclass(frozen=True)
class _Asked:
    """What a sample asks for, before the rest of its conversation is written."""

    kind: str
    topic: str
    topics: list[str]
    pieces: list[str]
    place: int
    prefix: str
    cut: tuple[str, str]  # kind and topic of the piece that is cut to fit

    @property
    def answer(self) -> str:
        return self.prefix + self.pieces[self.place]

    @property
    def question(self) -> str:
        return (
            f"Prepend {self.prefix} to the {ordinal(self.place + 1)} (1 indexed) {self.kind} about "
            f"{self.topic}. Do not include any other text in your response."
        )


def build(config: Config) -> MRCRSuite:
    return MRCRSuite(config)


class MRCRSuite(SuiteByLength[Config]):
    """Similar pieces, told apart by their order alone."""

    name = "mrcr"
    title = "the n-th of similar pieces (MRCR)"
    picture = "mrcr"
    cached = True

    def tasks(self) -> Sequence[str]:
        return [f"{needles} needles" for needles in self.options.needles]

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: TaskCell, index: int) -> Sample:
        rng = self._rng(cell, index)
        asked = self._asked(cell, rng)
        new_tokens = self._new_tokens(tokenizer, asked)
        ids = self._write(tokenizer, asked, cell.length_tokens - new_tokens, rng)
        if ids is None:
            raise self._too_short(cell)
        expected = {"prefix": asked.prefix, "pieces": asked.pieces, "asked": asked.place + 1}
        return Sample(ids, expected, new_tokens)

    def score(self, sample: Sample, text: str) -> Score:
        """The ratio of `similarity`; `measured` tells which of the similar pieces was asked for and
        which one the answer is closest to, 0 where the prefix is missing.
        """
        prefix, pieces = sample.expected["prefix"], sample.expected["pieces"]
        asked = sample.expected["asked"]
        given = end_of_answer(text) if self.options.prompt == "plain" else text
        ratios = [similarity(given, prefix + piece, prefix) for piece in pieces]
        closest = 1 + int(np.argmax(ratios)) if given.startswith(prefix) else 0
        measured = {"asked": asked, "closest": closest}
        return Score(prefix + pieces[asked - 1], text, ratios[asked - 1], measured)

    def settings(self) -> dict[str, Any]:
        options = self.options
        return {"seed": options.seed, "prompt": options.prompt, "piece_lines": options.piece_lines}

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        options = self.options
        options.check_positions(positions)
        shortest = min(options.lengths)
        for cell in self.cells():
            if cell.length_tokens > 2 * shortest:
                break
            if _needles(cell) * options.piece_lines > cell.length_tokens:
                raise self._too_short(cell)  # without writing all these pieces
            for index in range(min(cell.samples, _CHECKED_SAMPLES)):
                asked = self._asked(cell, self._rng(cell, index))
                room = cell.length_tokens - self._new_tokens(tokenizer, asked)
                frame = self._begin(tokenizer, asked, self._rng(cell, index)).frame()
                if sum(map(len, frame)) + _LEAST_CUT > room:
                    raise self._too_short(cell)

    def _rng(self, cell: TaskCell, index: int) -> np.random.Generator:
        seed = [self.options.seed, cell.length_tokens, _needles(cell), index]
        return np.random.default_rng(seed)

    def _asked(self, cell: TaskCell, rng: np.random.Generator) -> _Asked:
        needles, lines = _needles(cell), self.options.piece_lines
        topics = [TOPICS[i] for i in rng.choice(len(TOPICS), _TOPICS_OF_A_SAMPLE, replace=False)]
        kind = KINDS[int(rng.integers(len(KINDS)))]
        pieces: list[str] = []
        while len(pieces) < needles:
            piece = write_piece(kind, topics[0], lines, rng)
            if piece not in pieces:
                pieces.append(piece)
        prefix = "".join(rng.choice(_LETTERS, _PREFIX_LETTERS))
        place = int(rng.integers(needles))
        cut = _other((kind, topics[0]), topics, rng)
        return _Asked(kind, topics[0], topics, pieces, place, prefix, cut)

    def _new_tokens(self, tokenizer: PreTrainedTokenizerBase, asked: _Asked) -> int:
        """Room for the answer, rounded up so that prompts of a cell are often equally long."""
        before = " " if self.options.prompt == "plain" else ""
        needed = len(encode(tokenizer, before + asked.answer)) + _SPARE_TOKENS
        return -(-needed // _ROUND_TOKENS) * _ROUND_TOKENS

    def _begin(
        self, tokenizer: PreTrainedTokenizerBase, asked: _Asked, rng: np.random.Generator
    ) -> Conversation:
        """The similar pieces alone, in their order, and a turn that is cut."""
        conversation = Conversation(
            tokenizer, self.options.prompt, asked.question, _request(*asked.cut)
        )
        places = np.sort(rng.random(len(asked.pieces)))
        for place, piece in zip(places, asked.pieces, strict=True):
            conversation.add(float(place), Turn(_request(asked.kind, asked.topic), piece))
        return conversation

    def _write(
        self,
        tokenizer: PreTrainedTokenizerBase,
        asked: _Asked,
        length: int,
        rng: np.random.Generator,
    ) -> np.ndarray | None:
        """A conversation of exactly `length` tokens; None if the similar pieces do not fit."""
        conversation = self._begin(tokenizer, asked, rng)

        def add() -> int:
            kind, topic = _other((asked.kind, asked.topic), asked.topics, rng)
            turn = Turn(_request(kind, topic), write_piece(kind, topic, lines, rng))
            conversation.add(float(rng.random()), turn)
            return len(encode(tokenizer, turn.request)) + len(encode(tokenizer, turn.answer))

        lines = self.options.piece_lines
        before, after = conversation.frame()
        room = length - len(before) - len(after) - _LEAST_CUT
        if room < 0:
            return None
        # What a turn costs beside its words is told by the first one; the sum is then counted.
        words = add()
        around = sum(map(len, conversation.frame())) - len(before) - len(after) - words
        turn_tokens = words + around
        left, others = room - turn_tokens, 1
        while left > turn_tokens:
            added = 0
            while added < left:
                added += add() + around
                others += 1
            before, after = conversation.frame()
            left = length - len(before) - len(after) - _LEAST_CUT
        while left < 0:
            for _ in range(min(others, max(1, -left // turn_tokens))):
                conversation.drop()
                others -= 1
            before, after = conversation.frame()
            left = length - len(before) - len(after) - _LEAST_CUT
        cut = length - len(before) - len(after)
        filler = np.zeros(0, dtype=np.int64)
        while len(filler) < cut:
            piece = write_piece(*asked.cut, lines, rng)
            filler = np.append(filler, encode(tokenizer, piece + "\n"))
        return np.concatenate([before, filler[:cut], after])

    def _too_short(self, cell: TaskCell) -> ValueError:
        options = self.options
        return ValueError(
            f"{options.key('lengths')}: {cell.length_tokens} tokens do not hold {cell.task} of "
            f"{options.piece_lines} lines and the answer; choose longer lengths, fewer "
            "suite.mrcr.needles or shorter pieces (suite.mrcr.piece_lines)"
        )


def similarity(response: str, answer: str, prefix: str) -> float:
    """MRCR's score: difflib's ratio of what stands behind the prefix, 0 if that is missing."""
    if not response.startswith(prefix):
        return 0.0
    given, right = response.removeprefix(prefix), answer.removeprefix(prefix)
    return SequenceMatcher(None, given, right).ratio()


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th ... 11th ... 21st."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 10 < number % 100 < 20 else ending}"


def _needles(cell: TaskCell) -> int:
    """How many similar pieces a task has: the number at the beginning of its name."""
    return int(cell.task.split()[0])


def _request(kind: str, topic: str) -> str:
    return f"Write a {kind} about {topic}"


def _other(
    but: tuple[str, str], topics: Sequence[str], rng: np.random.Generator
) -> tuple[str, str]:
    """Kind and topic of another request: of another kind, or about another topic, or both."""
    while True:
        found = KINDS[int(rng.integers(len(KINDS)))], topics[int(rng.integers(len(topics)))]
        if found != but:
            return found
