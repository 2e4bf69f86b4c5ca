"""Books: Project Gutenberg's headers and footers off, title and author found."""

from __future__ import annotations

import re
from pathlib import Path

from ic.datamodules.compressed import without_compression
from ic.datamodules.corpus.document import Document, read_plain_text

SUFFIXES = (".md", ".markdown", ".txt", ".text")

# The marks of 2000 on, and those before; `THIS` became `THE` in 2020.
_START = re.compile(
    r"^[ \t]*\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*\*\*[^\n]*\n"
    r"|^\*END[ *]+THE SMALL PRINT![^\n]*\n",
    re.M | re.I | re.S,
)
_END = re.compile(
    r"^[ \t]*\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG"
    r"|^[ \t]*\**(?:This is the )?End of (?:the |this )?Project Gutenberg",
    re.M | re.I,
)
# What volunteers write between the mark and the book.
_CREDITS = re.compile(
    r"\A\s*(?:\[?(?:E-text prepared|Produced|This e?-?text was (?:produced|prepared|scanned)"
    r"|Transcribed|Scanned|Prepared|Updated)\b[^\n]*(?:\n[^\n]+)*\n\s*\n)+",
    re.I,
)
_FIELD = r"^{}:[ \t]*(\S[^\n]*(?:\n[ \t]+\S[^\n]*)*)"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*\n", re.S)
# The beginning of a Markdown book may be nothing but `# Title: X`, `## Author: Y`, `## Year: Z`.
_FIELD_HEADINGS = re.compile(
    r"\A(?:\s*#{1,3}[ \t]+\w[\w ]*:[ \t]*\S[^\n]*\n)+(?:\s*-{3,}[ \t]*\n)?"
)
_HEADING = re.compile(r"^#[ \t]+(\S.*?)[ \t#]*$", re.M)
_GUTENBERG = "Public domain in the USA (Project Gutenberg)"
_STANDARD_EBOOKS = "CC0-1.0 (Standard Ebooks)"


def book_files(folder: Path) -> list[Path]:
    """Files of books in a folder and its subfolders, in the order of their names."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and Path(without_compression(path.name)).suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_book(path: Path, folder: Path) -> Document:
    """A book without what was put around it.

    The author is what the book says of itself: front matter, or Project Gutenberg's header; else
    the name of the folder that the file lies in, if it is a subfolder of `folder`.

    Raises:
        UnreadableError: the file is no text.
    """
    whole = read_plain_text(path)
    front = _FRONT_MATTER.match(whole)
    text = whole[front.end() :] if front else whole
    header = front.group(1) if front else ""
    licence = _field(header, "licen[cs]e") or _field(header, "rights")
    if fields := _FIELD_HEADINGS.match(text):
        header += "\n" + re.sub(r"^\s*#+[ \t]+", "", fields.group(), flags=re.M)
        text = text[fields.end() :]
    if mark := _START.search(text):
        header = f"{header}\n{text[: mark.start()]}"
        text = _CREDITS.sub("", text[mark.end() :])
        licence = licence or _GUTENBERG
    elif "standard ebooks" in text[-3000:].lower():
        licence = licence or _STANDARD_EBOOKS
    if end := _END.search(text):
        text = text[: end.start()]
        licence = licence or _GUTENBERG
    heading = _HEADING.search(text[:5000])
    inside = path.parent != folder
    return Document(
        text.strip() + "\n",
        title=_field(header, "title")
        or (heading.group(1) if heading else "")
        or Path(without_compression(path.name)).stem,
        author=_field(header, "authors?|creator") or (path.parent.name if inside else None),
        licence=licence,
        kind="book",
    )


def _field(header: str, name: str) -> str | None:
    """The value of `Name: value`, which indented lines may continue, without quotes."""
    found = re.search(_FIELD.format(f"(?:{name})"), header, re.M | re.I)
    return " ".join(found.group(1).split()).strip("\"'") or None if found else None
