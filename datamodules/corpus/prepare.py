"""Makes a corpus: reads what was named, filters it, holds authors out and writes the files.

Documents are read once and kept in a file on disk, because what stands in many of them is known
only when all have been read.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from ic.datamodules.compressed import check_compression, open_text_for_writing
from ic.datamodules.corpus.boilerplate import Boilerplate
from ic.datamodules.corpus.books import book_files, read_book
from ic.datamodules.corpus.document import Document, UnreadableError
from ic.datamodules.corpus.near_duplicates import NearDuplicates
from ic.datamodules.corpus.options import PrepareCorpusOptions
from ic.datamodules.corpus.rfcs import read_rfc, rfc_files
from ic.datamodules.corpus.source_trees import (
    SkippedFiles,
    read_tree,
    source_directories,
    source_files,
)
from ic.files.atomic_write import replacing, write_json


@dataclass
class Counts:
    """What became of the documents.

    Attributes:
        kept: documents by part (`train`, `heldout`) and kind.
        num_bytes: of them, likewise.
        lengths: bytes of each document by kind, whatever its part.
        left_out: documents and files by reason.
        authors: by part.
    """

    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    authors: dict[str, set[str]] = field(default_factory=lambda: {"train": set(), "heldout": set()})
    cut_bytes: int = 0


# Something to read, and how: what it holds is known when it was read.
Reading = Callable[[], list[Document]]


def find_readings(options: PrepareCorpusOptions, skipped: SkippedFiles) -> list[Reading]:
    """What there is to read, in its order.

    Raises:
        ValueError: a folder that is not there, or holds no file of its kind.
    """
    readings: list[Reading] = []
    for key in ("books", "code", "rfcs"):
        for folder in getattr(options, key):
            if not Path(folder).is_dir():
                raise ValueError(f"{key}={folder}: no such folder (looked in {Path.cwd()})")

    def take(key: str, folder: str, found: Sequence[Reading], wanted: str) -> None:
        if not found:
            raise ValueError(f"{key}={folder}: nothing in it can be read; it should hold {wanted}")
        readings.extend(found)

    for folder in options.books:
        root = Path(folder)
        books = [partial(_only, read_book, path, root) for path in book_files(root)]
        take("books", folder, books, "books as .txt or .md, compressed or not")
    for folder in options.code:
        tree = Path(folder)
        directories = source_directories(tree)
        walk = read_tree(tree, skipped, directories)
        known = any(source_files(directory) for directory in directories)
        trees = [walk.__next__ for _ in directories] if known else []
        take("code", folder, trees, "source files")
    for folder in options.rfcs:
        rfcs = [partial(_only, read_rfc, path) for path in rfc_files(Path(folder))]
        take("rfcs", folder, rfcs, "RFCs as rfc<number>.txt, compressed or not")
    return readings


def prepare_corpus(
    options: PrepareCorpusOptions, progress: Callable[[list[Reading]], Iterator[Reading]] = iter
) -> Counts:
    """Write the files that the options name -> what became of the documents.

    The same folders and options give the same files. A file is complete or absent.

    Args:
        progress: shows how much has been read.

    Raises:
        ValueError: nothing to read, or nothing is left to be written; a compression that is not
            installed.
    """
    check_compression(options.output)
    skipped, counts = SkippedFiles(), Counts()
    boilerplate = Boilerplate(options.boilerplate_documents)
    readings = find_readings(options, skipped)
    options.train_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=options.train_file.parent) as spool:
        authors = _read_all(options, progress(readings), boilerplate, counts, spool)
        counts.left_out.update(skipped.counts)
        held_out = held_out_authors(options, authors)
        spool.seek(0)
        documents = (Document(**json.loads(line)) for line in spool)
        _write_all(options, documents, boilerplate, held_out, counts)
    return counts


def held_out_authors(options: PrepareCorpusOptions, authors: set[str]) -> set[str]:
    """Whose documents are held out.

    Raises:
        ValueError: an author of `held_out_authors` that has no document.
    """
    if options.held_out_authors:
        if missing := sorted(set(options.held_out_authors) - authors):
            raise ValueError(
                f"held_out_authors: no document is by {', '.join(missing)}; the authors are "
                f"{', '.join(sorted(authors)[:20])}{' ...' if len(authors) > 20 else ''}"
            )
        return set(options.held_out_authors)
    if not options.held_out or len(authors) < 2:
        return set()
    drawn = {author: _draw(author) for author in authors}
    chosen = {author for author in authors if drawn[author] < options.held_out}
    chosen = chosen or {min(authors, key=lambda author: (drawn[author], author))}
    return chosen if len(chosen) < len(authors) else chosen - {max(authors, key=_draw)}


def compressed_share(text: str) -> float:
    """Size of a text after zlib (level 6) by its size in UTF-8: English prose is near 0.4."""
    data = text.encode()
    return len(zlib.compress(data, 6)) / len(data)


def _only(read: Callable[..., Document], *where: Path) -> list[Document]:
    return [read(*where)]


def _read_all(
    options: PrepareCorpusOptions,
    readings: Iterator[Reading],
    boilerplate: Boilerplate,
    counts: Counts,
    spool: IO[str],
) -> set[str]:
    """Put what may stay into the spool -> the authors of it."""
    seen = NearDuplicates(options.near_duplicate) if options.near_duplicate < 1 else None
    digests: set[bytes] = set()
    authors: set[str] = set()
    for reading in readings:
        try:
            documents = reading()
        except UnreadableError:
            counts.left_out["files that are no text"] += 1
            continue
        for document in documents:
            digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            reason = _why_not(document, options)
            if reason is None and digest in digests:
                reason = "copies of another"
            digests.add(digest)
            if reason is None and seen is not None and not seen.add(document.text):
                reason = "near-duplicates of another"
            if reason is not None:
                counts.left_out[reason] += 1
                continue
            boilerplate.count(document.text)
            authors.add(_author(document))
            spool.write(json.dumps(asdict(document)) + "\n")
    return authors


def _why_not(document: Document, options: PrepareCorpusOptions) -> str | None:
    if len(document.text.encode()) < options.least_bytes:
        return f"below least_bytes={options.least_bytes}"
    share = compressed_share(document.text)
    if share < options.least_compressed:
        return f"repeat themselves (least_compressed={options.least_compressed:g})"
    if share > options.most_compressed:
        return f"cannot be compressed (most_compressed={options.most_compressed:g})"
    return None


def _write_all(
    options: PrepareCorpusOptions,
    documents: Iterator[Document],
    boilerplate: Boilerplate,
    held_out: set[str],
    counts: Counts,
) -> None:
    paths = {"train": options.train_file}
    if held_out:
        paths["heldout"] = options.heldout_file
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(
                open_text_for_writing(stack.enter_context(replacing(path)), path.name)
            )
            for part, path in paths.items()
        }
        for document in documents:
            text = boilerplate.cut(document.text)
            counts.cut_bytes += len(document.text.encode()) - len(text.encode())
            size = len(text.encode())
            if size < options.least_bytes:
                counts.left_out["little but boilerplate"] += 1
                continue
            part = "heldout" if _author(document) in held_out else "train"
            row = {**asdict(document), "text": text, "licence": document.licence or options.licence}
            files[part].write(json.dumps(row, ensure_ascii=False) + "\n")
            counts.kept[part, document.kind] += 1
            counts.num_bytes[part, document.kind] += size
            counts.lengths.setdefault(document.kind, []).append(size)
            counts.authors[part].add(_author(document))
        if not counts.kept:
            reasons = ", ".join(f"{number} {why}" for why, number in counts.left_out.most_common())
            raise ValueError(f"nothing is written: no document is left ({reasons or 'of none'})")
    if not held_out:
        options.heldout_file.unlink(missing_ok=True)  # of another time: it may be trained on now


def write_counts(options: PrepareCorpusOptions, counts: Counts) -> None:
    """Write how many documents of which kind there are, and with which options they were made."""
    write_json(
        options.counts_file,
        {
            "options": asdict(options),
            "parts": [
                {"part": part, "kind": kind, "documents": n, "bytes": counts.num_bytes[part, kind]}
                for (part, kind), n in sorted(counts.kept.items())
            ],
            "authors": {part: len(names) for part, names in counts.authors.items()},
            "left_out": dict(sorted(counts.left_out.items())),
            "boilerplate_bytes": counts.cut_bytes,
        },
    )


def _author(document: Document) -> str:
    """Whose documents stay together; a document of nobody stays by itself."""
    return document.author or document.title


def _draw(author: str) -> float:
    name = " ".join(author.casefold().split())
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
