"""Paragraphs that stand in many documents: licences, notices, transcribers' notes."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

LEAST_BYTES = 200
_BLANK_LINES = re.compile(r"\n[ \t]*\n")


class Boilerplate:
    """Counts in how many documents each long paragraph stands, then cuts what is in many.

    Args:
        documents: in how many it has to stand; 0 cuts nothing.
    """

    def __init__(self, documents: int) -> None:
        self.documents = documents
        self._counts: Counter[bytes] = Counter()

    def count(self, text: str) -> None:
        """Take note of a document."""
        if self.documents:
            digests = {_digest(paragraph) for paragraph in _BLANK_LINES.split(text)}
            self._counts.update(digest for digest in digests if digest is not None)

    def cut(self, text: str) -> str:
        """The text without the paragraphs that stand in as many documents."""
        if not self.documents:
            return text
        paragraphs = _BLANK_LINES.split(text)
        kept = [each for each in paragraphs if not self._is_common(each)]
        return text if len(kept) == len(paragraphs) else "\n\n".join(kept)

    def _is_common(self, paragraph: str) -> bool:
        digest = _digest(paragraph)
        return digest is not None and self._counts[digest] >= self.documents


def _digest(paragraph: str) -> bytes | None:
    """Of the words alone; None for a short paragraph."""
    if len(paragraph) < LEAST_BYTES // 4:
        return None
    words = " ".join(paragraph.split()).encode()
    return hashlib.blake2b(words, digest_size=8).digest() if len(words) >= LEAST_BYTES else None
