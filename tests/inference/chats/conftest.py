"""A folder with a model that writes conversations."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.model.byte_tokenizer import ByteTokenizer
from tests.inference.chats.writers import letters, llama


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    letters(llama(), 3.0).save_pretrained(tmp_path / "writer")
    ByteTokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"
