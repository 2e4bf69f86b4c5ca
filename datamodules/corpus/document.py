"""A document of a corpus, before it is a line of a file, and how its file is decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ic.datamodules.compressed import READ_ERRORS, open_bytes

_CHARACTER_SET = re.compile(rb"Character set encoding: *(?:ISO-?|iso-?)(?:8859-1|LATIN-?1)", re.I)
_BEGINNING_BYTES = 4096


@dataclass(frozen=True)
class Document:
    """What a line of the corpus holds.

    Attributes:
        text: without headers and footers.
        author: whose documents stay together when some are held out; of code the repository.
        licence: as the document states it.
        kind: `book`, `code` or `rfc`.
    """

    text: str
    title: str
    author: str | None
    licence: str | None
    kind: str


class UnreadableError(ValueError):
    """A file that is no text."""


def read_plain_text(path: Path) -> str:
    """The text of a file, decompressed as its suffix says, with `\\n` at the ends of lines.

    UTF-8, or Latin-1 where a header of Project Gutenberg says so.

    Raises:
        UnreadableError: neither of them, damaged, or bytes that no text holds.
    """
    try:
        with open_bytes(str(path)) as file:
            data = file.read()
    except READ_ERRORS as error:
        raise UnreadableError(str(error)) from error
    if b"\0" in data[:_BEGINNING_BYTES]:
        raise UnreadableError("it holds NUL bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not _CHARACTER_SET.search(data[:_BEGINNING_BYTES]):
            raise UnreadableError(f"not UTF-8: {error.reason}") from error
        text = data.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")
