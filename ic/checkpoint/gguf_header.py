"""The single values that a GGUF file begins with, read without its arrays and tensors.

The package `gguf` reads a file's vocabulary and table of tensors before it tells anything, which
takes seconds. The layout is that of ggml's `docs/gguf.md`, versions 2 and 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from ic.checkpoint.errors import CheckpointError

Value = int | float | bool | str
# GGUF's numbers of types -> struct's letters.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_KEY_BYTES = 2**16


def gguf_values(path: Path) -> dict[str, Value]:
    """The numbers, truth values and strings of a file's metadata by their keys.

    Raises:
        CheckpointError: it is no GGUF file, or ends too early.
    """
    try:
        with open(path, "rb") as file:
            return _Reader(file).values()
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is no GGUF file, or is damaged: {error}") from error


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.order = "<"
        version = self.scalar("I")
        if not int(version) & 0xFFFF:  # a big-endian file
            self.order = ">"
            version = struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")

    def values(self) -> dict[str, Value]:
        _num_tensors, num_keys = self.scalar("Q"), int(self.scalar("Q"))
        found: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self.string(_MOST_KEY_BYTES)
            kind = int(self.scalar("I"))
            if kind == _ARRAY:
                self.skip_array()
            else:
                found[key] = self.string() if kind == _STRING else self.scalar(_letter(kind))
        return found

    def scalar(self, letter: str) -> int | float | bool:
        layout = struct.Struct(self.order + letter)
        value: int | float | bool = layout.unpack(self.file.read(layout.size))[0]
        return value

    def string(self, most_bytes: int = 2**31) -> str:
        size = int(self.scalar("Q"))
        if size > most_bytes:
            raise ValueError(f"a string of {size} bytes")
        text = self.file.read(size)
        if len(text) < size:
            raise ValueError("it ends amid its metadata")
        return text.decode("utf-8", errors="replace")

    def skip_array(self) -> None:
        kind, number = int(self.scalar("I")), int(self.scalar("Q"))
        if kind == _STRING:
            for _ in range(number):
                self.file.seek(int(self.scalar("Q")), 1)
        elif kind == _ARRAY:
            for _ in range(number):
                self.skip_array()
        else:
            self.file.seek(struct.calcsize("<" + _letter(kind)) * number, 1)


def _letter(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]
