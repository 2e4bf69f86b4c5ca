"""Text to hide needles in: the user's documents, or synthetic noise; cut at sentence ends."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.needles import NOISE
from ic.datamodules.sentence_tokens import tokenize_sentences
from ic.datamodules.text_files import TextFiles, detect_format, expand_folders, resolve_files
from ic.evaluation.framing import encode

SETTING = "suite.niah.haystack"
# Enough to draw from; more would take minutes to tokenise.
MOST_CHARACTERS = 2**26


@dataclass(frozen=True)
class Filler:
    """Tokens between which needles may go.

    Attributes:
        ids_T: token ids (T,) int64, up to the end of a sentence.
        ends: places in 0..T behind the end of a sentence (int64, ascending), T among them.
    """

    ids_T: np.ndarray
    ends: np.ndarray

    def place(self, depth: float) -> int:
        """The end of a sentence that is nearest to a depth, 0 the beginning and 1 the end."""
        return int(self.ends[np.abs(self.ends - depth * len(self.ids_T)).argmin()])


class Haystack:
    """Documents, of which a sample gets as many tokens as it needs.

    Args:
        documents: texts, none of them empty.
        repeat: whether the documents may come again where they do not suffice.
    """

    def __init__(self, documents: list[str], *, repeat: bool) -> None:
        self.documents = documents
        self.repeat = repeat
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokens: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def digest(self) -> str:
        """Sum of the documents."""
        sums = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            sums.update(f"{len(document)} ".encode() + document.encode())
        return sums.hexdigest()

    def check(self, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        """Refuse a haystack that has fewer tokens than a sample needs.

        Raises:
            ValueError: says how many it has.
        """
        if self.repeat:
            return
        found = 0
        for index in range(len(self.documents)):
            found += len(self.tokens(tokenizer, index)[0])
            if found >= tokens:
                return
        raise ValueError(
            f"{SETTING}: the text has {found:,} tokens, but a length needs {tokens:,}; give more "
            "text, choose shorter suite.niah.lengths, or let it be repeated with "
            "suite.niah.repeat=true"
        )

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (T,) int64 of a document, and the places in 1..T where a sentence ends."""
        if self._tokenizer is not tokenizer:
            self._tokenizer, self._tokens = tokenizer, {}
        if index not in self._tokens:
            (self._tokens[index],) = tokenize_sentences(tokenizer, [self.documents[index]])
        return self._tokens[index]

    def cut(
        self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, tokens: int
    ) -> Filler:
        """So many tokens, from a place that is drawn up to the end of a sentence.

        Documents come in an order that is drawn, and the first of them goes on from anywhere
        within it; so the text begins within a sentence, as a page of a book does.

        Raises:
            ValueError: there are not as many tokens, and they may not be repeated.
        """
        order = rng.permutation(len(self.documents))
        skipped = int(rng.integers(len(self.tokens(tokenizer, int(order[0]))[0])))
        filler = self._from(tokenizer, order, skipped, tokens)
        # What was passed over at the beginning may be what is missing at the end.
        filler = filler or self._from(tokenizer, order, 0, tokens)
        if filler is None:
            raise ValueError(f"{SETTING}: fewer than {tokens:,} tokens of text")
        return filler

    def _from(
        self, tokenizer: PreTrainedTokenizerBase, order: np.ndarray, skipped: int, tokens: int
    ) -> Filler | None:
        between = encode(tokenizer, "\n\n")
        pieces, ends, have, turn = [], [], 0, 0
        while turn < len(order) or self.repeat:
            ids, places = self.tokens(tokenizer, int(order[turn % len(order)]))
            pieces += [ids[skipped:], between]
            ends.append(places[places >= skipped] - skipped + have)
            have += len(ids) - skipped + len(between)
            skipped, turn = 0, turn + 1
            if ends[-1].size and ends[-1][-1] >= tokens:
                all_ends = np.concatenate(ends)
                end = int(all_ends[np.searchsorted(all_ends, tokens)])
                ids_T = np.concatenate(pieces)[end - tokens : end]
                inside = all_ends[(all_ends >= end - tokens) & (all_ends <= end)]
                return Filler(_mend(tokenizer, ids_T), inside - (end - tokens))
        return None


def read_haystack(path: str, *, repeat: bool) -> Haystack:
    """The documents of a file, a folder or a glob, up to 2^26 characters of them.

    Raises:
        ValueError: nothing there, nothing in it, or not readable.
    """
    files = resolve_files(expand_folders([path], SETTING), SETTING)
    kind = detect_format(files, "auto", SETTING, "suite.niah")
    haystack = haystack_of(TextFiles(files, kind, "text", "file", "suite.niah"), repeat=repeat)
    if haystack is None:
        raise ValueError(
            f"{SETTING}={path}: there is no text in it; python -m ic prepare_corpus makes a "
            "haystack out of a folder of books"
        )
    return haystack


def haystack_of(texts: TextFiles, *, repeat: bool) -> Haystack | None:
    """The documents of files, up to 2^26 characters of them; None if there is no text in them.

    Raises:
        ValueError: a file cannot be read.
    """
    documents: list[str] = []
    left = MOST_CHARACTERS
    for index in range(len(texts)):
        for _, text in texts.documents(index):
            document = text[:left].replace("\r\n", "\n").strip()
            left -= len(document)
            documents += [document] if document else []
            if left <= 0:
                break
        if left <= 0:
            break
    return Haystack(documents, repeat=repeat) if documents else None


def noise_haystack() -> Haystack:
    """The sentences of Mohtashami and Jaggi, over and over."""
    return Haystack([NOISE.decode().strip()] * 2, repeat=True)


def _mend(tokenizer: PreTrainedTokenizerBase, ids_T: np.ndarray) -> np.ndarray:
    """A text that begins within a character begins with line ends instead."""
    line_end = encode(tokenizer, "\n")[-1]
    mended = ids_T.copy()
    for place in range(min(4, len(mended))):
        if not str(tokenizer.decode(mended[place : place + 4].tolist())).startswith("\ufffd"):
            break
        mended[place] = line_end
    return mended
