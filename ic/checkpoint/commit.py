"""Folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ic.files.retry_io import retrying


def partial_path(target: Path) -> Path:
    """Where a folder is written before it gets its name; `*.partial-*` can be removed at start."""
    return target.with_name(f"{target.name}.partial-{os.getpid()}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's files and its list of names to the disk.

    Its files get the mode that the umask gives: safetensors makes its own for their owner alone.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    mode = folder.stat().st_mode & 0o666
    for path in files:
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
    for path in [*files, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def commit_folder(partial: Path, target: Path) -> None:
    """Give a finished folder its name. What had the name before steps aside until then.

    Raises:
        OSError: the file system cannot rename; `target` is as it was.
    """
    aside = target.with_name(f"{target.name}.partial-old-{os.getpid()}")
    replaces = target.exists()
    with _claimed(target) if replaces else nullcontext():
        if replaces:
            target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            if replaces:
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder that takes the name `target` when the block has filled it.

    If the block fails, `target` is as it was, and nothing of the other is left.

    Raises:
        OSError: the folder cannot be made, flushed or renamed.
    """
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with _claimed(partial):
            yield partial
            sync_folder(partial)
            retrying(lambda: commit_folder(partial, target))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_partial(target: Path) -> None:
    """Put right what a process that was killed left of `whole_folder(target)`: its unfinished
    folder goes, and what had stepped aside for a finished one that never came gets its name back.

    A folder that a process is writing at this moment stays, and so does one on a file system that
    cannot tell.
    """
    name = re.escape(target.name)
    for path in sorted(target.parent.glob(f"{glob.escape(target.name)}.partial-*")):
        kind = re.fullmatch(rf"{name}\.partial-(old-)?\d+", path.name)
        if kind is None or not path.is_dir() or path.is_symlink():
            continue
        with contextlib.suppress(OSError), _claimed(path) as claimed:
            if claimed and kind[1] and not target.exists():
                path.rename(target)
            elif claimed:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether a folder is this process's own until the block ends or the process is gone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed = True
        except OSError:  # another process's, or a file system without such locks
            claimed = False
        yield claimed
    finally:
        os.close(descriptor)


def check_file_system(folder: Path) -> str | None:
    """What `folder`'s file system cannot do that checkpoints need, or None.

    Checkpoints are renamed when they are whole, and `last` and `best` are symbolic links.
    """
    probe = folder / f"probe.partial-{os.getpid()}"
    renamed = folder / f"renamed.partial-{os.getpid()}"
    link = folder / f"link.partial-{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        probe.rename(renamed)
        link.symlink_to(renamed.name)
        link.replace(folder / f"moved.partial-{os.getpid()}")
    except OSError as error:
        return (
            f"checkpoints cannot be kept in {folder}: {error}. They need a writable file system "
            "with renames and symbolic links; set output_dir to one"
        )
    finally:
        for path in (link, folder / f"moved.partial-{os.getpid()}"):
            path.unlink(missing_ok=True)
        for path in (probe, renamed):
            shutil.rmtree(path, ignore_errors=True)
    return None
