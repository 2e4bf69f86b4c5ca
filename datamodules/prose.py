"""The user's documents, as a row of tokens or sentence by sentence, from a place that is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.text_files import TextFiles, detect_format, resolve_files
from ic.datamodules.token_store import FOLDER, TokenStore, tokenized
from ic.files.cache_folder import cache_folder


@dataclass(frozen=True)
class Prose:
    """Documents to draw from, each as often as it is long.

    Attributes:
        store: their tokens.
        begins: the first token of each document that may be drawn (int64, ascending).
        ends: behind the last token of each, and behind the blank line that follows.
        sums: tokens of the documents up to each, its own among them.
    """

    store: TokenStore
    begins: np.ndarray
    ends: np.ndarray
    sums: np.ndarray

    @classmethod
    def read(
        cls, config: RetrievalDataOptions, tokenizer: PreTrainedTokenizerBase, setting: str
    ) -> Prose | None:
        """The documents of `data.<setting>`; None if it names no file.

        Raises:
            ValueError: a file cannot be read, the files hold no text, or no document is as long as
                `least_document_tokens`.
        """
        patterns = getattr(config, setting)
        if not patterns:
            return None
        name = f"data.{setting}"
        files = resolve_files(patterns, name)
        file_format = detect_format(files, config.format, name)
        store = tokenized(
            TextFiles(files, file_format, config.text_column, config.document_unit),
            tokenizer,
            setting=name,
            most_bytes=config.text_megabytes * 2**20,
            cache=cache_folder(config.token_cache, FOLDER),
        )
        behind = len(store.tokens) - int(store.documents[-1])  # tokens of a blank line
        ends = np.asarray(store.documents) + behind
        begins = np.concatenate([[0], ends[:-1]])
        lengths = ends - begins - behind
        kept = lengths >= config.least_document_tokens
        if not kept.any():
            raise ValueError(
                f"{name}: no document has data.least_document_tokens="
                f"{config.least_document_tokens}; the longest has {lengths.max()} tokens"
            )
        begins, ends = begins[kept], ends[kept]
        return cls(store, begins, ends, np.cumsum(ends - begins))

    def spans(self, rng: np.random.Generator, length: int) -> Iterator[tuple[int, int]]:
        """Tokens from..to of one document after the other, without end.

        The first begins at a sentence, and where its document has `length` tokens it has them from
        there on. Those that follow are whole documents.
        """
        for number in count():
            begin, end = self._draw(rng)
            room = end - begin - length
            if number == 0 and room > 0:
                begin = self._sentence_at(begin + int(rng.integers(room + 1)), begin)
            yield begin, end

    def sentences(self, rng: np.random.Generator, length: int) -> Iterator[np.ndarray]:
        """`length` tokens of `spans`, int64, sentence by sentence, each with the space before it.

        They end with a sentence, and begin within one, as a page of a book does.
        """
        pieces: list[tuple[int, int]] = []
        excess = -length
        for begin, end in self.spans(rng, length):
            first, last = np.searchsorted(self.store.sentences, (begin, end), side="right")
            # A book has thousands of sentences, of which a few may be enough.
            enough = np.searchsorted(self.store.sentences, begin - excess) + 1
            cuts = [begin, *self.store.sentences[first : min(last, enough)].tolist(), end]
            for start, stop in pairwise(cuts):
                if excess < 0:
                    pieces.append((start, stop))
                    excess += stop - start
            if excess >= 0:
                break
        for start, stop in pieces:
            dropped = min(excess, stop - start)
            excess -= dropped
            if start + dropped < stop:
                yield self.store.tokens[start + dropped : stop].astype(np.int64)

    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens of `spans`, int64, and the number of the document of each, int32."""
        tokens = np.empty(length, dtype=np.int64)
        documents = np.empty(length, dtype=np.int32)
        filled = 0
        for number, (begin, end) in enumerate(self.spans(rng, length)):
            stop = min(length, filled + end - begin)
            tokens[filled:stop] = self.store.tokens[begin : begin + stop - filled]
            documents[filled:stop] = number
            filled = stop
            if filled == length:
                break
        return tokens, documents

    def _draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """First token and end of a document that is drawn by one of its tokens."""
        index = int(np.searchsorted(self.sums, rng.integers(self.sums[-1]), side="right"))
        return int(self.begins[index]), int(self.ends[index])

    def _sentence_at(self, place: int, least: int) -> int:
        """The beginning of the sentence that a place lies in, the document's at the least."""
        before = int(np.searchsorted(self.store.sentences, place, side="right")) - 1
        return max(least, int(self.store.sentences[before]) if before >= 0 else 0)
