"""Files that may be compressed, opened as what they hold: one way for every reader of data."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from ic.datamodules.options import COMPRESSIONS

# What a reader meets in a file that is damaged, cut short or not compressed at all.
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError)


def without_compression(path: str) -> str:
    """The path without a final suffix of `COMPRESSIONS`: its own suffix tells the format."""
    return str(Path(path).with_suffix("")) if _compression(path) else path


def open_bytes(path: str) -> IO[bytes]:
    """The file's content for reading, decompressed as its suffix says.

    Raises:
        ValueError: a `.zst` file without the package that reads it.
        OSError: it cannot be opened.
    """
    open_as: dict[str, Callable[[str], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zstandard,
    }
    compression = _compression(path)
    return cast(IO[bytes], open_as[compression](path)) if compression else open(path, "rb")


def _compression(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def _open_zstandard(path: str) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError as error:
        raise ValueError(
            f"{path}: reading .zst needs the package zstandard (pip install zstandard); or "
            "compress it as .gz, .bz2 or .xz"
        ) from error
    return io.BufferedReader(zstandard.open(path, "rb"))
