"""What files are rather than how they are spelled: sums of their content, and which are the same.

Sums are BLAKE2b over the bytes on disk. A file whose stamp has not changed is not read again: the
operating system sets the time of the last change (ctime), and no program can set it back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ic.datamodules.compressed import READ_ERRORS, open_bytes, without_compression
from ic.files.retry_io import retrying

_PIECE_BYTES = 2**20
_BEGINNING_BYTES = 2**16
_THREADS = 8  # hashing lets other threads run; more than a disk gives at once


@runtime_checkable
class ReadsFiles(Protocol):
    """A datamodule of files."""

    def check_files(self) -> None:
        """Look whether the files of a training are there, before its run writes anything.

        Raises:
            ValueError: none is named, or one is not there.
        """


@dataclass(frozen=True)
class FileSum:
    """A file's content, and how to tell that it is still the same without reading it.

    Attributes:
        stamp: size, times of the last writing and of the last change in ns, inode, device.
        digest: sum of its bytes.
    """

    stamp: tuple[int, ...]
    digest: str

    def as_list(self) -> list[Any]:
        return [list(self.stamp), self.digest]

    @classmethod
    def from_list(cls, saved: list[Any]) -> FileSum:
        return cls(tuple(saved[0]), saved[1])


def sum_files(files: Sequence[str], known: Sequence[FileSum] = ()) -> list[FileSum]:
    """The sum of each file; rank 0 reads them, once, and tells the others.

    Args:
        known: sums from before, of the same files in the same order; a file whose stamp is still
            the same is not read.

    Raises:
        OSError: a file cannot be read.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    box: list[Any] = [None]
    if not distributed or torch.distributed.get_rank() == 0:
        before = [*known[: len(files)], *[None] * (len(files) - len(known))]
        with ThreadPoolExecutor(_THREADS) as pool:
            box = [list(pool.map(_sum_unless_known, files, before))]
    if distributed:
        torch.distributed.broadcast_object_list(box)
    sums: list[FileSum] = box[0]
    return sums


def refuse_shared_files(training: Sequence[str], others: Mapping[str, Sequence[str]]) -> None:
    """Refuse files that are trained on and evaluated on too.

    They are the same if they are one file on disk (another spelling, a link, a hard link), or if
    their content is the same, compressed or not.

    Args:
        training: paths of `data.train_files`.
        others: paths by the setting that names them, such as `data.val_files`.

    Raises:
        ValueError: names both files and the setting.
    """
    by_place = {_place(file): file for file in training}
    by_beginning: dict[str, list[str]] = {}
    if any(others.values()):
        for file in training:
            by_beginning.setdefault(_beginning(file), []).append(file)
    for setting, files in others.items():
        for file in files:
            same = by_place.get(_place(file)) or next(
                (each for each in by_beginning.get(_beginning(file), []) if _equal(each, file)),
                None,
            )
            if same is not None:
                what = "" if same == file else f" ({same} is the same)"
                raise ValueError(
                    f"{setting}: {file} is also in data.train_files{what}; evaluation on training "
                    "data measures memory: take it out of one of them"
                )


def _sum_unless_known(file: str, known: FileSum | None) -> FileSum:
    stamp = _stamp(file)
    if known is not None and known.stamp == stamp:
        return known
    return FileSum(stamp, retrying(lambda: _digest_of_bytes(file)))


def _digest_of_bytes(file: str) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, _new_digest).hexdigest()


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _stamp(file: str) -> tuple[int, ...]:
    stat = os.stat(file)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)


def _place(file: str) -> tuple[int, int]:
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino


def _beginning(file: str) -> str:
    """Sum of the first bytes of the content; of a file that cannot be read, which its reader
    refuses with a better message, something of its own.
    """
    try:
        with open_bytes(file) as opened:
            digest = _new_digest()
            digest.update(opened.read(_BEGINNING_BYTES))
            return str(digest.hexdigest())
    except READ_ERRORS:
        return f"unreadable {file}"


def _equal(left: str, right: str) -> bool:
    """Whether two files hold the same, once decompressed."""
    plain = all(without_compression(file) == file for file in (left, right))
    if plain and Path(left).stat().st_size != Path(right).stat().st_size:
        return False
    try:
        with open_bytes(left) as one, open_bytes(right) as other:
            while (piece := one.read(_PIECE_BYTES)) == other.read(_PIECE_BYTES):
                if not piece:
                    return True
    except READ_ERRORS:
        pass
    return False
