"""The two files of a model card, and whether a hand has changed the page since it was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ic.files.results import read_json

CARD, CARD_FACTS = "README.md", "model_card.json"
DIGEST = "readme_sha256"  # of the page, in the facts


def digest(content: bytes) -> str:
    """What identifies a page."""
    return hashlib.sha256(content).hexdigest()


def is_edited(folder: Path) -> bool:
    """Whether a folder has a README.md that is not, byte for byte, the one that was written."""
    if not (folder / CARD).is_file():
        return False
    try:
        written = read_json(folder / CARD_FACTS).get(DIGEST)
    except (OSError, ValueError, AttributeError):
        return True
    return bool(written != digest((folder / CARD).read_bytes()))
