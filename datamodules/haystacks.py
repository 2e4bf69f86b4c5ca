"""What facts are strewn into: noise, random letters, random words, or the user's text, as tokens.

A haystack is drawn in sentences, each tokenized with the space before it, so that facts stand
between sentences and every tokenizer will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.facts.words import english_words
from ic.datamodules.needles import NOISE, draw_filler
from ic.datamodules.prose import Prose
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.sentence_tokens import encode_texts

# Texts to the token ids of each, (tokens,) int64.
Encode = Callable[[Sequence[str]], list[np.ndarray]]
_BYTES_AT_ONCE = 2048
_WORDS_PER_SENTENCE = (4, 16)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """How a tokenizer encodes plain text; what spells a special token stays text."""
    return partial(encode_texts, tokenizer)


class Haystack:
    """Draws haystacks of the kinds that a configuration weighs.

    Raises:
        ValueError: the text files cannot be read.
    """

    def __init__(self, config: RetrievalDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encode = encoder(tokenizer)
        held_out = Prose.read(config, tokenizer, "val_files")
        self._prose = {
            "train": Prose.read(config, tokenizer, "train_files"),
            "validation": held_out,
            "test": held_out,
        }
        self._weights = config.haystack_weights
        sentences = [f" {s.strip()}." for s in NOISE.decode().split(".") if s.strip()]
        self._noise = self._encode(sentences)

    def draw(self, rng: np.random.Generator, split: str, length: int) -> Iterator[np.ndarray]:
        """Sentences (tokens,) int64 of `length` tokens or more, of a kind that is drawn first; of
        text they are as many, from one document if there is one so long.
        """
        yield from self._stream(rng, split, self._draw_kind(rng, split), length)

    def row(
        self, rng: np.random.Generator, split: str, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens of a haystack, int64, and the number of the document of each, int32."""
        kind = self._draw_kind(rng, split)
        prose = self._prose[split]
        if kind == "text" and prose is not None:
            return prose.row(rng, length)
        tokens, filled = np.empty(length, dtype=np.int64), 0
        for sentence in self._stream(rng, split, kind, length):
            stop = min(length, filled + len(sentence))
            tokens[filled:stop] = sentence[: stop - filled]
            filled = stop
            if filled == length:
                break
        return tokens, np.zeros(length, dtype=np.int32)

    def _stream(
        self, rng: np.random.Generator, split: str, kind: str, length: int
    ) -> Iterator[np.ndarray]:
        prose = self._prose[split]
        if kind == "text" and prose is not None:
            yield from prose.sentences(rng, length)
            return
        if kind == "noise":
            at = int(rng.integers(len(self._noise)))
            while True:
                yield self._noise[at % len(self._noise)]
                at += 1
        while True:
            yield from self._encode(_sentences(rng, split, kind))

    def _draw_kind(self, rng: np.random.Generator, split: str) -> str:
        weights = dict(self._weights)
        if self._prose[split] is None:
            weights.pop("text", None)
        kinds = [kind for kind, weight in weights.items() if weight > 0]
        shares = np.cumsum([weights[kind] for kind in kinds])
        return kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]


def _sentences(rng: np.random.Generator, split: str, kind: str) -> list[str]:
    """Sentences of random letters or words, around 2 kB of them."""
    if kind == "random":
        letters = draw_filler(rng, kind, _BYTES_AT_ONCE).tobytes().decode()
        lengths = rng.integers(20, 100, size=_BYTES_AT_ONCE // 20)
        ends = np.cumsum(lengths)
        return [
            " " + letters[end - length : end].strip()
            for length, end in zip(lengths, ends, strict=True)
            if end <= _BYTES_AT_ONCE
        ]
    words = english_words()[split]
    drawn = [words[int(index)] for index in rng.integers(len(words), size=_BYTES_AT_ONCE // 7)]
    sentences, at = [], 0
    for length in rng.integers(*_WORDS_PER_SENTENCE, size=len(drawn)):
        if at >= len(drawn):
            break
        sentences.append(" " + " ".join(drawn[at : at + int(length)]).capitalize() + ".")
        at += int(length)
    return sentences
