"""What facts are strewn into: noise, random letters, random words, or the user's text, as tokens.

A haystack is drawn in sentences, each tokenized with the space before it, so that facts stand
between sentences and every tokenizer will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from ic.datamodules.facts.words import english_words
from ic.datamodules.needles import NOISE, draw_filler
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.text_files import TextFiles, detect_format, resolve_files
from ic.model.byte_tokenizer import ByteTokenizer

# Texts to the token ids of each, (tokens,) int64.
Encode = Callable[[Sequence[str]], list[np.ndarray]]
_LONGEST_SENTENCE = 600  # characters
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")
_WORDS_PER_SENTENCE = (4, 16)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """How a tokenizer encodes plain text; what spells a special token stays text."""
    if isinstance(tokenizer, ByteTokenizer):
        return lambda texts: [
            np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts
        ]

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    return encode


@dataclass(frozen=True)
class Prose:
    """Documents of text files, one behind the other.

    Attributes:
        text: their UTF-8 (bytes,) uint8; worker processes share its memory.
    """

    text: np.ndarray

    @classmethod
    def read(cls, config: RetrievalDataOptions, setting: str) -> Prose | None:
        """The documents of `data.<setting>`; None if it names no file.

        Raises:
            ValueError: a file cannot be read, or all of them together hold no text.
        """
        patterns = getattr(config, setting)
        if not patterns:
            return None
        files = resolve_files(patterns, f"data.{setting}")
        file_format = detect_format(files, config.format, f"data.{setting}")
        reader = TextFiles(files, file_format, config.text_column, config.document_unit)
        limit, size, documents = config.text_megabytes * 2**20, 0, []
        for index in range(len(files)):
            for _, text in reader.documents(index):
                documents.append(np.frombuffer(f"{text}\n\n".encode(), dtype=np.uint8))
                size += len(documents[-1])
                if size > limit:
                    rank_zero_warn(
                        f"data.{setting}: more than data.text_megabytes={config.text_megabytes} of "
                        f"text; what follows in {files[index]} and behind it is not used"
                    )
                    return cls(np.concatenate(documents)[:limit])
        if not documents:
            raise ValueError(f"data.{setting}: the files hold no text")
        return cls(np.concatenate(documents))

    def sentences(self, rng: np.random.Generator, num_bytes: int) -> list[str]:
        """Successive sentences from a random place on, around so many bytes of them."""
        start = int(rng.integers(len(self.text)))
        wrapped = np.arange(start, start + num_bytes + _LONGEST_SENTENCE) % len(self.text)
        text = self.text[wrapped].tobytes().decode(errors="ignore")
        found = _SENTENCE_END.split(text)
        whole = found[1:-1] if len(found) > 2 else found  # the outer ones are cut
        return [sentence for sentence in whole if len(sentence) <= _LONGEST_SENTENCE] or [text]


class Haystack:
    """Draws haystacks of the kinds that a configuration weighs.

    Raises:
        ValueError: the text files cannot be read.
    """

    def __init__(self, config: RetrievalDataOptions, encode: Encode) -> None:
        self._encode = encode
        held_out = Prose.read(config, "val_files")
        self._prose = {
            "train": Prose.read(config, "train_files"),
            "validation": held_out,
            "test": held_out,
        }
        self._weights = config.haystack_weights
        self._noise = encode([f" {s.strip()}." for s in NOISE.decode().split(".") if s.strip()])

    def draw(self, rng: np.random.Generator, split: str) -> Iterator[np.ndarray]:
        """Sentences without end, all of one kind that is drawn first."""
        weights = dict(self._weights)
        if self._prose[split] is None:
            weights.pop("text", None)
        kinds = [kind for kind, weight in weights.items() if weight > 0]
        shares = np.cumsum([weights[kind] for kind in kinds])
        kind = kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
        if kind == "noise":
            at = int(rng.integers(len(self._noise)))
            while True:
                yield self._noise[at % len(self._noise)]
                at += 1
        num_bytes = 2048
        while True:
            yield from self._encode(self._sentences(rng, split, kind, num_bytes))

    def _sentences(
        self, rng: np.random.Generator, split: str, kind: str, num_bytes: int
    ) -> list[str]:
        if kind == "text":
            prose = self._prose[split]
            assert prose is not None
            return prose.sentences(rng, num_bytes)
        if kind == "random":
            letters = draw_filler(rng, kind, num_bytes).tobytes().decode()
            lengths = rng.integers(20, 100, size=num_bytes // 20)
            ends = np.cumsum(lengths)
            return [
                " " + letters[end - length : end].strip()
                for length, end in zip(lengths, ends, strict=True)
                if end <= num_bytes
            ]
        words = english_words()[split]
        drawn = [words[int(index)] for index in rng.integers(len(words), size=num_bytes // 7)]
        sentences, at = [], 0
        for length in rng.integers(*_WORDS_PER_SENTENCE, size=len(drawn)):
            if at >= len(drawn):
                break
            sentences.append(" " + " ".join(drawn[at : at + int(length)]).capitalize() + ".")
            at += int(length)
        return sentences
