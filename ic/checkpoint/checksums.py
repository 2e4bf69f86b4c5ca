"""Whether a checkpoint's files are those that were written.

    checksums.sha256        a line for each file of the folder, in the form of `sha256sum`

Neither safetensors nor PyTorch's archives are checked when they are read: a flipped bit would train
on. Shards have checksum files of their own (`ic.checkpoint.storage`), which the rank that wrote
them makes. Folders of earlier versions have no checksums; they are read as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from ic.checkpoint.errors import damaged_error

CHECKSUMS = "checksums.sha256"
_OF_A_SHARD = (".distcp", ".distcp.sha256")
# What this process has checked, by path, size and time of change: a folder is read several times
# on the way to a model, and hashed once.
_intact: set[tuple[Path, int, int]] = set()


def write_checksums(folder: Path) -> None:
    """Write `checksums.sha256` of the files that lie in a folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and _is_listed(p.name))
    lines = [f"{sha256(file)}  {file.name}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines))


def check_intact(
    folder: Path, *, only: Collection[str] | None = None, but: Collection[str] = ()
) -> None:
    """Compare a folder's files with its checksums, if it has any.

    Args:
        only: names of the files to compare; None for all.
        but: names of files that will not be read. Files that the list does not name are not
            compared, and neither is a listed file that is gone: its reader says what it is for.

    Raises:
        CheckpointError: names the first file that differs, and what to use in its place.
    """
    list_file = folder / CHECKSUMS
    if not list_file.is_file():
        return
    for line in list_file.read_bytes().decode(errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or Path(name).name != name:
            raise damaged_error(list_file, f"it is no list of checksums: {line[:80]!r}")
        file = folder / name
        if name in but or (only is not None and name not in only) or not file.is_file():
            continue
        status = file.stat()
        state = (file.absolute(), status.st_size, status.st_mtime_ns)
        if state in _intact:
            continue
        if sha256(file) != digest:
            raise damaged_error(file, f"it differs from its line in {CHECKSUMS}")
        _intact.add(state)


def sha256(file: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_listed(name: str) -> bool:
    return name != CHECKSUMS and not name.endswith(_OF_A_SHARD)
