"""Long documents of the user's: some of those that are long enough, drawn by a seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.text_files import TextFiles, detect_format, expand_folders, resolve_files
from ic.datamodules.text_stream import DocumentTokenizer
from ic.evaluation.framing import frame_prompt
from ic.evaluation.perplexity.grid import Config


@dataclass(frozen=True)
class Document:
    """The beginning of a document.

    Attributes:
        name: `file:row`.
        ids_T: token ids int32, with the tokenizer's own first token if it adds one.
        bytes_T: bytes of text that each token stands for, int32.
    """

    name: str
    ids_T: np.ndarray
    bytes_T: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_T)

    def beginning(self, length: int) -> Document:
        return Document(self.name, self.ids_T[:length].copy(), self.bytes_T[:length].copy())


class Documents:
    """The documents of the suite's files.

    Raises:
        ValueError: a file that is not there or empty.
    """

    def __init__(self, options: Config) -> None:
        setting = options.setting("files")
        group = setting.rpartition(".")[0]
        paths = resolve_files(expand_folders(options.files, setting), setting)
        # Answers of before are shown and compared without the files.
        file_format = detect_format(paths, options.format, setting, group) if paths else "text"
        self.options = options
        self.files = TextFiles(
            paths, file_format, options.text_column, options.document_unit, group
        )
        self._digests: list[str] | None = None
        self._drawn: dict[int, list[Document]] = {}
        self._drawn_for: PreTrainedTokenizerBase | None = None

    @property
    def digests(self) -> list[str]:
        """Sums of the files' bytes."""
        if self._digests is None:
            self._digests = []
            for path in self.files.files:
                with open(path, "rb") as file:
                    self._digests.append(hashlib.file_digest(file, "blake2b").hexdigest()[:32])
        return self._digests

    def of_length(self, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Document]:
        """The documents of a length, cut to it, in the order in which the seed drew them.

        Raises:
            ValueError: no files, or fewer documents are that long than samples were asked for.
        """
        if not self.files.files:
            raise ValueError(
                f"{self.options.setting('files')} is empty: name long texts that the model was not "
                "trained on, folders or files (text, .jsonl, .parquet), for example ['books/*.txt']"
            )
        if self._drawn_for is not tokenizer:
            self._drawn = self._draw(tokenizer)
            self._drawn_for = tokenizer
        return self._drawn[length]

    def _draw(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[Document]]:
        """Read everything once; keep for each length the documents of the lowest ranks.

        A rank is a hash of the seed and the text, so a draw does not depend on the order of the
        files, only what would be kept is tokenised, and a document that is there twice counts once.
        """
        wanted = {length: self.options.num_samples(length) for length in self.options.lengths}
        kept: dict[int, list[tuple[int, Document]]] = {length: [] for length in wanted}
        ranks: set[int] = set()
        longest = ""
        tokenize = _Tokenize(tokenizer)
        for name, text in self._texts():
            rank = self._rank(text)
            if rank in ranks:
                continue
            ranks.add(rank)
            longest = max(longest, text, key=len)
            # A token stands for one byte at least.
            bound = len(text.encode()) + len(tokenize.first_T)
            open_to = [
                length
                for length, documents in kept.items()
                if bound >= length and (len(documents) < wanted[length] or rank < -documents[0][0])
            ]
            document = tokenize(name, text, max(open_to)) if open_to else None
            for length in open_to:
                if document is None or len(document) < length:
                    continue
                push = heapq.heappush if len(kept[length]) < wanted[length] else heapq.heappushpop
                push(kept[length], (-rank, document.beginning(length)))
        for length, documents in kept.items():
            if len(documents) < wanted[length]:
                most = len(tokenize("", longest, len(longest.encode()) + len(tokenize.first_T)))
                raise ValueError(self._too_few(length, len(documents), len(ranks), most))
        return {
            length: [document for _, document in sorted(documents, key=lambda each: -each[0])]
            for length, documents in kept.items()
        }

    def _texts(self) -> Iterator[tuple[str, str]]:
        for index, path in enumerate(self.files.files):
            for row, text in self.files.documents(index):
                yield f"{Path(path).name}:{row + 1}", text

    def _rank(self, text: str) -> int:
        seeded = f"{self.options.seed} {text}".encode()
        return int.from_bytes(hashlib.blake2b(seeded, digest_size=16).digest())

    def _too_few(self, length: int, found: int, count: int, longest: int) -> str:
        asked = self.options.num_samples(length)
        key = self.options.key("lengths")
        if not count:
            return f"{self.options.key('files')}: no document with any text in them"
        if not found:
            return (
                f"{key}: none of {count} documents has {length:,} tokens; the longest has "
                f"{longest:,}: choose shorter lengths or name longer documents"
            )
        return (
            f"{key}: {found} of {count} documents have {length:,} tokens, but {asked} samples were "
            f"asked for: set {self.options.setting('samples_by_length')}={{{length}:{found}}} or "
            "name more documents"
        )


class _Tokenize:
    """Text to the first `tokens` of a document, with the tokenizer's own first token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.first_T = frame_prompt(tokenizer, "plain").before.astype(np.int32)
        self._tokenize = DocumentTokenizer(tokenizer, prepend_bos=False, append_eos=False)

    def __call__(self, name: str, text: str, tokens: int) -> Document:
        tokens_T2 = self._tokenize.beginning(text, tokens - len(self.first_T))
        return Document(
            name,
            np.concatenate([self.first_T, tokens_T2[:, 0]]),
            np.concatenate([np.zeros_like(self.first_T), tokens_T2[:, 1]]),
        )
