"""Files that may be compressed, opened as what they hold: one way for every reader of data."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ic.datamodules.options import COMPRESSIONS

# What a reader meets in a file that is damaged, cut short or not compressed at all.
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError)


_CHUNK = 1 << 16  # bytes


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


def check_compression(path: str) -> None:
    """Refuse a suffix that cannot be read or written here, before any work.

    Raises:
        ValueError: a `.zst` file without the package for it.
    """
    if _compression(path) == ".zst":
        _zstandard(path, "writing")


@contextmanager
def open_text_for_writing(path: Path, name: str) -> Iterator[IO[str]]:
    """A new file for UTF-8, compressed as the suffix of `name` says.

    The same text gives the same bytes: no time and no name goes into the file.

    Args:
        path: where to write, whatever its suffix: a file that is renamed to `name` at the end.
    """
    compression = _compression(name)
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if compression == ".gz":
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        elif compression == ".bz2":
            file = stack.enter_context(bz2.BZ2File(file, "wb"))
        elif compression == ".xz":
            file = stack.enter_context(lzma.LZMAFile(file, "wb"))
        elif compression == ".zst":
            compressor = _zstandard(name, "writing").ZstdCompressor()
            file = stack.enter_context(compressor.stream_writer(file, closefd=False))
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline="\n"))


def _compression(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def _open_zstandard(path: str) -> IO[bytes]:
    return io.BufferedReader(_ZstandardReader(path, _zstandard(path, "reading")))


class _ZstandardReader(io.RawIOBase):
    """All frames of a file; the package's own reader takes the first, or a cut one, for the whole.

    Raises:
        OSError: what is read is damaged.
        EOFError: the file ends within a frame.
    """

    def __init__(self, path: str, package: Any) -> None:
        self._package = package
        self._file = Path(path).open("rb")  # noqa: SIM115 - closed with this
        self._frame = package.ZstdDecompressor().decompressobj()
        self._is_between_frames = True
        self._waiting = b""  # decompressed and not yet read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            compressed = self._frame.unused_data if self._frame.eof else b""
            compressed = compressed or self._file.read(_CHUNK)
            if not compressed and self._is_between_frames:
                return 0
            if not compressed:
                raise EOFError("the file ends within a zstandard frame")
            if self._frame.eof:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            try:
                self._waiting = self._frame.decompress(compressed)
            except self._package.ZstdError as error:
                raise OSError(str(error)) from error
            self._is_between_frames = self._frame.eof
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstandard(path: str, doing: str) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise ValueError(
            f"{path}: {doing} .zst needs the package zstandard (pip install zstandard); or "
            "compress it as .gz, .bz2 or .xz"
        ) from error
