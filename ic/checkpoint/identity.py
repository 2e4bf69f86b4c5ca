"""The identity of a source by its files: known before PyTorch is loaded, and in a moment.

`ic.model.fingerprint` tells weights apart by every bit, once they are loaded. Here large files are
looked at in places only: training changes nearly every number of the matrices that it trains.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ic.checkpoint.hugging_face import CONFIG, INDEX, TOKENIZER_PARTS
from ic.checkpoint.source import Source

_WEIGHTS = (".safetensors", ".distcp", ".gguf")
_OTHERS = ("adapter_config.json", CONFIG, INDEX)
# Of a larger file so many pieces of so many bytes are read, evenly spaced.
_WHOLE_BYTES = 64 << 20
_PIECES, _PIECE_BYTES = 4096, 4096


def source_identity(source: Source) -> str:
    """Identity of a source's weights, configuration and tokenizer.

    Raises:
        OSError: a file cannot be read.
    """
    return _files_identity([source.path] if source.is_gguf else _files(source.path))


def tokenizer_files_identity(folder: Path) -> str:
    """Identity of the tokenizer that a folder holds.

    Raises:
        OSError: a file cannot be read.
    """
    names = sorted(TOKENIZER_PARTS)
    return _files_identity([folder / name for name in names if (folder / name).is_file()])


def _files(folder: Path) -> list[Path]:
    """In a fixed order; the adapter of a LoRA checkpoint lies in a folder of its own."""
    return sorted(
        path
        for parent in (folder, folder / "adapter")
        if parent.is_dir()
        for path in parent.iterdir()
        if path.is_file() and (path.suffix in _WEIGHTS or path.name in TOKENIZER_PARTS + _OTHERS)
    )


def _files_identity(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.parent.name == 'adapter'} {file.name} {size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for piece in range(_PIECES):
                stream.seek(piece * (size - _PIECE_BYTES) // (_PIECES - 1))
                digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]
