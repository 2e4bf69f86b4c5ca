"""What facts are strewn into: noise, random letters, random words, or the user's text, as tokens.

A haystack is drawn in sentences, each tokenized with the space before it, so that facts stand
between sentences and every tokenizer will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

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
_TOKENS_AT_ONCE = 512  # of text, to find a sentence in
_WORDS_PER_SENTENCE = (4, 16)


class Haystack:
    """Draws haystacks of the kinds that a configuration weighs.

    Raises:
        ValueError: the text files cannot be read.
    """

    def __init__(self, config: RetrievalDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.encode: Encode = partial(encode_texts, tokenizer)
        self._decode = tokenizer.decode
        held_out = Prose.read(config, tokenizer, "val_files")
        self._prose = {
            "train": Prose.read(config, tokenizer, "train_files"),
            "validation": held_out,
            "test": held_out,
        }
        self._weights = config.haystack_weights
        sentences = [f" {s.strip()}." for s in NOISE.decode().split(".") if s.strip()]
        self._noise = self.encode(sentences)

    def draw(self, rng: np.random.Generator, split: str, length: int) -> Iterator[np.ndarray]:
        """Sentences (tokens,) int64 of `length` tokens or more, of a kind that is drawn first; of
        text they are as many, from one document if there is one so long.
        """
        yield from self.stream(rng, split, self.draw_kind(rng, split), length)

    def row(
        self, rng: np.random.Generator, split: str, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens of a haystack, int64, and the number of the document of each, int32."""
        kind = self.draw_kind(rng, split)
        prose = self._prose[split]
        if kind == "text" and prose is not None:
            return prose.row(rng, length)
        tokens, filled = np.empty(length, dtype=np.int64), 0
        for sentence in self.stream(rng, split, kind, length):
            stop = min(length, filled + len(sentence))
            tokens[filled:stop] = sentence[: stop - filled]
            filled = stop
            if filled == length:
                break
        return tokens, np.zeros(length, dtype=np.int32)

    def stream(
        self, rng: np.random.Generator, split: str, kind: str, length: int
    ) -> Iterator[np.ndarray]:
        """As `draw`, of a kind that is given."""
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
            yield from self.encode(_sentences(rng, split, kind))

    def single_sentences(self, rng: np.random.Generator, split: str, kind: str) -> Iterator[str]:
        """Sentences as text, without end; of the files each from another place.

        Noise has five sentences that every row of it repeats, so nothing follows them but once:
        in its place stand random words.
        """
        prose = self._prose[split]
        while True:
            if kind == "text" and prose is not None:
                # The first begins within a sentence, and may be the only one.
                *_, found = islice(prose.sentences(rng, _TOKENS_AT_ONCE), 2)
                tokens = found.tolist()
                text = self._decode(tokens, clean_up_tokenization_spaces=False)
                yield str(text).strip()
            else:
                yield from _sentences(rng, split, "words" if kind == "noise" else kind)

    def draw_kind(self, rng: np.random.Generator, split: str) -> str:
        weights = dict(self._weights)
        if self._prose[split] is None:
            weights.pop("text", None)
        kinds = [kind for kind, weight in weights.items() if weight > 0]
        shares = np.cumsum([weights[kind] for kind in kinds])
        return kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]


class RowText:
    """The haystack of one row, whose kind is drawn when it is first needed (`Sentences`)."""

    def __init__(
        self, haystack: Haystack, rng: np.random.Generator, split: str, length: int
    ) -> None:
        self._haystack, self._rng, self._split, self._length = haystack, rng, split, length
        self._drawn: list[np.ndarray] = []
        self._bytes = b""
        self._others: Iterator[str] = iter(())

    def draw(self) -> str:
        """A sentence of the kind of the row; of the files from anywhere."""
        self._draw_row()
        return next(self._others)

    def holds(self, text: str) -> bool:
        """Whether the row has the text; its first word differs where it begins a paragraph."""
        self._draw_row()
        (tokens,) = self._haystack.encode([f" {text.split(maxsplit=1)[1]}"])
        return tokens.tobytes() in self._bytes

    def sentences(self, length: int) -> Iterator[np.ndarray]:
        """The last `length` tokens of the row, or as many of a haystack that is drawn now."""
        if not self._drawn:
            yield from self._haystack.draw(self._rng, self._split, length)
            return
        excess = sum(map(len, self._drawn)) - length
        for sentence in self._drawn:
            dropped = min(excess, len(sentence))
            excess -= dropped
            if dropped < len(sentence):
                yield sentence[dropped:]

    def _draw_row(self) -> None:
        """All the tokens that the row may need, so that one knows what is in it."""
        if self._drawn:
            return
        rng, split, filled = self._rng, self._split, 0
        kind = self._haystack.draw_kind(rng, split)
        for sentence in self._haystack.stream(rng, split, kind, self._length):
            self._drawn.append(sentence)
            filled += len(sentence)
            if filled >= self._length:
                break
        self._bytes = np.concatenate(self._drawn).tobytes()
        self._others = self._haystack.single_sentences(rng, split, kind)


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
