"""Source trees: the files of a directory joined into one document, generated files left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ic.datamodules.corpus.document import Document, UnreadableError, read_plain_text

_SUFFIXES = """
.ada .asm .awk .bash .bat .c .cc .clj .cmake .cpp .cs .css .cu .cuh .cxx .d .dart .el .erl .ex .exs
.f .f90 .fs .go .gradle .groovy .h .hh .hpp .hs .html .hxx .java .jl .js .jsx .kt .lisp .lua .m .md
.mk .ml .mli .mm .nim .pas .php .pl .pm .proto .ps1 .py .pyx .r .rb .rs .rst .s .scala .scm .sh .sql
.swift .tcl .tex .toml .ts .tsx .v .vhd .vim .vue .yaml .yml .zig
"""
SUFFIXES = frozenset(_SUFFIXES.split())
NAMES = frozenset(("Makefile", "Kconfig", "Dockerfile", "CMakeLists.txt"))
# Other people's code, and what a build leaves.
SKIPPED_FOLDERS = frozenset(
    ("node_modules", "vendor", "third_party", "build", "dist", "target", "__pycache__", "venv")
)
# A directory below this goes into its parent's document; a document above it is split at a file.
LEAST_BYTES, MOST_BYTES = 8_000, 4_000_000
_MOST_FILE_BYTES = 1_000_000
_GENERATED = re.compile(
    r"@generated|\bauto-?(?:matically )?-?generated\b|\bgenerated (?:automatically|by|from|file)\b"
    r"|\bdo not (?:edit|modify)\b",
    re.I,
)
_BEGINNING_LINES, _BEGINNING_CHARACTERS = 30, 3000
_CONSTANT = re.compile(
    r"^\s*#\s*define\s+\w+\s+[(\w]|^\s*\w+\s*=\s*\(?(?:0x)?[0-9a-fA-F]+\)?,?\s*$"
)
_COMMENT = re.compile(r"^\s*(?://|/\*|\*|#(?!\s*define))")
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([^\n*]+?)\s*(?:\*/|-->|\n)")


@dataclass
class SkippedFiles:
    """How many files were left out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class _Joined:
    """Files that go into one document."""

    texts: list[str] = field(default_factory=list)
    num_bytes: int = 0
    licences: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, text: str) -> None:
        self.texts.append(f"===== {name} =====\n{text.strip()}\n")
        self.num_bytes += len(text.encode())
        self.licences.update(_SPDX.findall(text[:_BEGINNING_CHARACTERS]))

    def take(self, other: _Joined) -> None:
        self.texts += other.texts
        self.num_bytes += other.num_bytes
        self.licences += other.licences


def source_directories(tree: Path) -> list[Path]:
    """Directories of a tree, those below before the one above, without hidden and built ones."""
    found: list[Path] = []
    for folder, names, _ in os.walk(tree, topdown=True):
        names[:] = sorted(n for n in names if n not in SKIPPED_FOLDERS and not n.startswith("."))
        found.append(Path(folder))
    return sorted(found, key=lambda path: (-len(path.parts), str(path)))


def source_files(directory: Path) -> list[Path]:
    """The source files of a directory itself, in the order of their names."""
    return sorted(path for path in directory.iterdir() if _is_source(path))


def read_tree(
    tree: Path, skipped: SkippedFiles, directories: list[Path]
) -> Iterator[list[Document]]:
    """The documents that each directory of a tree completes, in the order of `directories`.

    Each file is preceded by a line with its path. A directory with little of its own goes into the
    document of the one above. The repository counts as the author.
    """
    waiting: dict[Path, _Joined] = {}
    for directory in directories:
        own, documents = waiting.pop(directory, _Joined()), []
        for path in source_files(directory):
            text = _source_text(path, skipped)
            if text is None:
                continue
            if own.num_bytes + len(text) > MOST_BYTES and own.texts:
                documents.append(_document(own, directory, tree))
                own = _Joined()
            own.add(path.relative_to(tree.parent).as_posix(), text)
        if own.num_bytes >= LEAST_BYTES or (directory == tree and own.texts):
            documents.append(_document(own, directory, tree))
        elif own.texts:
            waiting.setdefault(directory.parent, _Joined()).take(own)
        yield documents


def is_generated(text: str) -> bool:
    """Whether a file says that a program wrote it, or is nothing but a table of constants."""
    beginning = "\n".join(text[:_BEGINNING_CHARACTERS].split("\n")[:_BEGINNING_LINES])
    if _GENERATED.search(beginning):
        return True
    lines = [line for line in text.split("\n") if line.strip() and not _COMMENT.match(line)]
    constants = sum(bool(_CONSTANT.match(line)) for line in lines)
    return len(lines) >= 100 and constants > 0.9 * len(lines)


def _is_source(path: Path) -> bool:
    known = path.suffix.lower() in SUFFIXES or path.name in NAMES
    return known and path.is_file() and not path.is_symlink() and not path.name.startswith(".")


def _source_text(path: Path, skipped: SkippedFiles) -> str | None:
    """The text of a file, or None with a count of why not."""
    if path.stat().st_size > _MOST_FILE_BYTES:
        skipped.counts["files above 1 MB"] += 1
        return None
    try:
        text = read_plain_text(path)
    except UnreadableError:
        skipped.counts["files that are no text"] += 1
        return None
    if not text.strip():
        return None
    if is_generated(text) or ".min." in path.name:
        skipped.counts["generated files"] += 1
        return None
    return text


def _document(joined: _Joined, directory: Path, tree: Path) -> Document:
    name = tree.resolve().name
    inside = directory.relative_to(tree).as_posix()
    licences = joined.licences.most_common(1)
    return Document(
        "\n".join(joined.texts),
        title=name if inside == "." else f"{name}/{inside}",
        author=name,
        licence=licences[0][0] if licences else None,
        kind="code",
    )
