"""Which documents are held out of training for validation.

A document's content decides, not its place: documents that are the same lie on the same side, and
neither the order of the files nor their number moves one to the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_HASH_BYTES = 8


@dataclass(frozen=True)
class Part:
    """A part of the documents: all of them, those held out, or the others.

    Attributes:
        fraction: share of the documents that are held out, about.
        held_out: whether this part is theirs.
    """

    fraction: float = 0.0
    held_out: bool = False

    def __contains__(self, text: str) -> bool:
        if not self.fraction:
            return not self.held_out
        digest = hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()
        drawn = int.from_bytes(digest, "little") / 2 ** (8 * _HASH_BYTES)
        return (drawn < self.fraction) == self.held_out

    @property
    def advice(self) -> str:
        """What to change where the part is too small."""
        if not self.fraction:
            return ""
        kind = "held out" if self.held_out else "left for training"
        return (
            f"; these are the documents {kind} with data.val_fraction={self.fraction}: change it, "
            "or cut text files into more documents with data.document_unit=paragraph or line"
        )
