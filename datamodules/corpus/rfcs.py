"""RFCs: page breaks, page headers and footers off, title and first author found."""

from __future__ import annotations

import re
from pathlib import Path

from ic.datamodules.compressed import without_compression
from ic.datamodules.corpus.document import Document, read_plain_text

LICENCE = "IETF Trust Legal Provisions (BCP 78)"

_NAME = re.compile(r"rfc-?\d+\.txt", re.I)
# `Postel            [Page 7]`, a form feed, and `RFC 791      Internet Protocol    September 1981`.
_FOOTER = re.compile(r"^.*\[Page +[\divxlc]+\][ \t]*$", re.M | re.I)
_PAGE_HEADER = re.compile(r"^ ?RFC[ -]?\d+\b.*\b(?:19|20)\d\d[ \t]*$", re.I)
_STREAM = re.compile(
    r"^(?:Network Working Group|Internet (?:Engineering|Architecture|Research)\b.*?"
    r"|Independent Submission)[ \t]{3,}(\S[^\n]*?)[ \t]*$",
    re.M,
)
_NUMBER = re.compile(r"\d+")
_SENTENCE_END = (".", ":", ";", "!", "?")


def rfc_files(folder: Path) -> list[Path]:
    """Files named `rfc<number>.txt` in a folder and its subfolders, in the order of the numbers."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and _NAME.fullmatch(without_compression(path.name))
    ]
    return sorted(found, key=lambda path: (int(_NUMBER.findall(path.name)[0]), str(path)))


def read_rfc(path: Path) -> Document:
    """An RFC as one running text.

    Raises:
        UnreadableError: the file is no text.
    """
    text = join_pages(read_plain_text(path))
    number = _NUMBER.findall(path.name)[0]
    stream = _STREAM.search(text[:3000])
    return Document(
        text,
        title=f"RFC {int(number)}: {_title(text)}".removesuffix(": "),
        author=stream.group(1) if stream else None,
        licence=LICENCE,
        kind="rfc",
    )


def join_pages(text: str) -> str:
    """The text without form feeds, page headers and page footers.

    A sentence that goes over a page goes on in the next line; otherwise a blank line stays. Lines
    that only look like a page header stay where they are not at the top of a page.
    """
    pages = [_without_margins(page) for page in text.split("\f")]
    joined = ""
    for page in filter(None, pages):
        if not joined:
            joined = page
            continue
        goes_on = not joined.endswith(_SENTENCE_END) and page.lstrip()[:1].islower()
        joined += ("\n" if goes_on else "\n\n") + page
    return re.sub(r"\n{3,}", "\n\n", joined).strip("\n") + "\n"


def _without_margins(page: str) -> str:
    """A page from its first line to its last, their indentation kept."""
    lines = [line.rstrip() for line in _FOOTER.sub("", page).split("\n")]
    first = next((index for index, line in enumerate(lines) if line), len(lines))
    if first < len(lines) and _PAGE_HEADER.match(lines[first]):
        lines = lines[first + 1 :]
    return "\n".join(lines).strip("\n")


def _title(text: str) -> str:
    """The centred lines after the block of names and dates at the top."""
    blocks = [block for block in text[:5000].split("\n\n") if block.strip()]
    for block in blocks[1:4]:
        lines = block.strip("\n").split("\n")
        if all(line.startswith("    ") or not line for line in lines) and len(lines) <= 4:
            return " ".join(" ".join(lines).split())
    return ""
