"""Documents of text files as tokens: tokenized once for the same files and tokenizer, then mapped
into memory by whoever reads them, workers and ranks alike.

    <folder>/<key>/tokens.npy       token ids of all documents, one behind the other
                   sentences.npy    places behind the end of a sentence, ascending
                   documents.npy    places behind the end of a document, ascending
                   unused.json      where the text begins that was too much, or null

The key is a sum of the files' content, the way they are read and the tokenizer. A folder is written
under a temporary name and renamed, so a reader sees all of it or nothing. Of several processes of
a host that want the same folder one makes it and the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from ic.datamodules.file_contents import sum_files
from ic.datamodules.sentence_tokens import encode_texts, tokenize_sentences
from ic.datamodules.text_files import TextFiles
from ic.datamodules.tokenizers import tokenizer_identity

FOLDER = "tokens"  # of `data.token_cache=auto`
_VERSION = 1  # of the files' form, and of what is a sentence
_DOCUMENTS_AT_ONCE = 256
_BETWEEN = "\n\n"  # behind each document
_ARRAYS = ("tokens", "sentences", "documents")
_UNUSED = "unused.json"


@dataclass(frozen=True)
class TokenStore:
    """Documents, one behind the other, each followed by a blank line.

    Attributes:
        tokens: ids (N,), uint16 or uint32.
        sentences: places in 1..N behind the last token of a sentence (int64, ascending).
        documents: places in 1..N behind the last token of a document (int64, ascending).
        unused: the file in which the text begins that was too much; None if all of it is here.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    unused: str | None = None

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """One that was written, mapped into memory.

        Raises:
            OSError, ValueError: it is not there, or not whole.
        """
        tokens, sentences, documents = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
        )
        return cls(tokens, sentences, documents, json.loads((folder / _UNUSED).read_text()))

    def write(self, folder: Path) -> None:
        """Write it whole; a folder that is there already stays."""
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            partial.mkdir(parents=True)
            for name in _ARRAYS:
                np.save(partial / f"{name}.npy", getattr(self, name))
            (partial / _UNUSED).write_text(json.dumps(self.unused))
            with contextlib.suppress(FileExistsError):
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def tokenized(
    files: TextFiles,
    tokenizer: PreTrainedTokenizerBase,
    *,
    setting: str,
    most_bytes: int,
    cache: Path | None,
) -> TokenStore:
    """The documents of text files as tokens, from the cache if they are there.

    Args:
        setting: that names the files, for the messages.
        most_bytes: of text that is used; a warning says when the files have more.
        cache: folder of all stores; None tokenizes in this process, for it alone.

    Raises:
        ValueError: a file cannot be read, or all of them together hold no text.
    """
    store = _cached(files, tokenizer, setting, most_bytes, cache)
    rank_zero_info(f"{setting}: {len(store.tokens):,} tokens in {len(store.documents):,} documents")
    if store.unused is not None:
        rank_zero_warn(
            f"{setting}: more than data.text_megabytes={most_bytes // 2**20} of text; what follows "
            f"in {store.unused} and behind it is not used"
        )
    return store


def _cached(
    files: TextFiles,
    tokenizer: PreTrainedTokenizerBase,
    setting: str,
    most_bytes: int,
    cache: Path | None,
) -> TokenStore:
    if cache is None:
        return _tokenize(files, tokenizer, setting, most_bytes)
    shaping = [
        _VERSION,
        [each.digest for each in sum_files(files.files)],
        files.file_format,
        files.text_column,
        files.document_unit,
        most_bytes,
        tokenizer_identity(tokenizer),
    ]
    key = hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:24]
    folder = cache / key
    made: TokenStore | None = None
    try:
        with _alone(cache / f"{key}.lock"):
            if (found := _open(folder)) is not None:
                return found
            shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
            made = _tokenize(files, tokenizer, setting, most_bytes)
            made.write(folder)
            return TokenStore.open(folder)
    except OSError as error:
        rank_zero_warn(
            f"data.token_cache={cache}: {error.strerror or error}; the text is tokenized by each "
            "process for itself, and again by the next run"
        )
        return made or _tokenize(files, tokenizer, setting, most_bytes)


def _open(folder: Path) -> TokenStore | None:
    try:
        return TokenStore.open(folder)
    except (OSError, ValueError, EOFError):
        return None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of this host at a time, where the file system knows locks."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tokenize(
    files: TextFiles, tokenizer: PreTrainedTokenizerBase, setting: str, most_bytes: int
) -> TokenStore:
    (between,) = encode_texts(tokenizer, [_BETWEEN])
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces: list[np.ndarray] = []
    sentences: list[np.ndarray] = []
    documents: list[int] = []
    unused: list[str] = []
    size = 0
    for ids, ends in chain.from_iterable(
        tokenize_sentences(tokenizer, some) for some in _some(files, most_bytes, unused)
    ):
        if not len(ids):
            continue
        pieces += [ids.astype(dtype), between.astype(dtype)]
        sentences.append(ends + size)
        documents.append(size + len(ids))
        size += len(ids) + len(between)
    if not documents:
        raise ValueError(f"{setting}: the files hold no text")
    return TokenStore(
        np.concatenate(pieces),
        np.concatenate(sentences),
        np.array(documents, dtype=np.int64),
        unused[0] if unused else None,
    )


def _some(files: TextFiles, most_bytes: int, unused: list[str]) -> Iterator[Sequence[str]]:
    """The documents, a few hundred at once, up to a limit; `unused` gets the file that has more."""
    some: list[str] = []
    left = most_bytes
    for index in range(len(files)):
        for _, text in files.documents(index):
            encoded = text.encode()
            if len(encoded) > left:
                unused.append(files.files[index])
                text = encoded[:left].decode(errors="ignore")
            left -= len(encoded)
            some += [text] if text else []
            if left < 0 or len(some) >= _DOCUMENTS_AT_ONCE:
                yield some
                some = []
            if left < 0:
                return
    if some:
        yield some
