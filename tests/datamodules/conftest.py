"""A small corpus whose every document is different, in each format that text data can have."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ic.model.byte_tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """40 documents of 12 to about 260 bytes; some with line breaks and characters of two bytes."""
    rng = random.Random(0)
    return [
        f"document {i} "
        + "".join(rng.choices("abcdé \n", weights=[9, 9, 9, 9, 1, 4, 1], k=rng.randint(1, 240)))
        + "."
        for i in range(40)
    ]


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[[list[str], str, int], list[str]]:
    """Write documents in a format over some files, consecutive ones together; returns the glob."""

    def write(documents: list[str], file_format: str, num_files: int = 1) -> list[str]:
        folder = tmp_path / f"corpus-{file_format}-{num_files}"
        folder.mkdir()
        each = -(-len(documents) // num_files)
        for number in range(num_files):
            part = documents[number * each : (number + 1) * each]
            if file_format == "jsonl":
                lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(part)]
                (folder / f"{number:03}.jsonl").write_text("\n".join(lines) + "\n")
            elif file_format == "parquet":
                table = pyarrow.table({"text": part, "id": list(range(len(part)))})
                pyarrow.parquet.write_table(table, folder / f"{number:03}.parquet")
            else:
                (text,) = part  # one document a file
                (folder / f"{number:03}.txt").write_text(text)
        return [str(folder / "*")]

    return write
