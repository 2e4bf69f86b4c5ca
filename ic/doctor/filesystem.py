"""Whether the output directory can hold runs: space, rename, links, speed, clock."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ic.display.numbers import gib
from ic.doctor.check import Finding

MIN_FREE_BYTES = 2 * 2**30  # less than one checkpoint of the 1B with its optimizer
GOOD_FREE_BYTES = 50 * 2**30
PROBE_BYTES = 64 * 2**20
SLOW_BYTES_PER_S = 100e6
MAX_SKEW_S = 5.0


def output_directory(path: Path) -> Iterator[Finding]:
    """All checks of `path`, made beside where runs will be written."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    yield free_space(existing)
    if not existing.is_dir():
        yield Finding("output_dir", "fail", f"{existing} is a file", "set output_dir= to a folder")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing) as probe:
            yield from writing(Path(probe))
    except OSError as error:
        yield Finding(
            "output_dir",
            "fail",
            f"cannot write in {existing}: {error.strerror}",
            "change its owner or mode, or set output_dir= to another folder",
        )


def free_space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{gib(free)} free in {folder}"
    fix = "free some space, or set output_dir= to another disk"
    if free < MIN_FREE_BYTES:
        return Finding("free space", "fail", found, fix)
    if free < GOOD_FREE_BYTES:
        return Finding("free space", "warn", found, fix)
    return Finding("free space", "ok", found)


def writing(folder: Path) -> Iterator[Finding]:
    """Rename over a file, replace a link, write fast: what checkpoints rest on."""
    yield atomic_rename(folder)
    yield symbolic_links(folder)
    yield write_speed(folder)
    yield clock_of_files(folder)


def atomic_rename(folder: Path) -> Finding:
    def attempt() -> bool:
        for name, text in (("new", "2"), ("old", "1")):
            (folder / name).write_text(text)
        os.replace(folder / "new", folder / "old")
        (folder / "partial").mkdir()
        (folder / "partial").rename(folder / "whole")
        return (folder / "old").read_text() == "2" and (folder / "whole").is_dir()

    return _attempted(
        "rename",
        attempt,
        ok="replaces a file, moves a folder",
        failed="the old file is still there",
        fix="checkpoints need a POSIX file system; set output_dir= elsewhere",
    )


def symbolic_links(folder: Path) -> Finding:
    def attempt() -> bool:
        for target in ("step=1", "step=2"):
            (folder / "link.partial").symlink_to(target)
            (folder / "link.partial").replace(folder / "link")
        return os.readlink(folder / "link") == "step=2"

    return _attempted(
        "symbolic links",
        attempt,
        ok="can be made and replaced",
        failed="a link cannot be replaced",
        fix="`last` and `best` are links; set output_dir= to another file system",
    )


def _attempted(
    name: str, attempt: Callable[[], bool], *, ok: str, failed: str, fix: str
) -> Finding:
    try:
        works = attempt()
    except OSError as error:
        return Finding(name, "fail", f"fails: {error.strerror}", fix)
    return Finding(name, "ok", ok) if works else Finding(name, "fail", failed, fix)


def write_speed(folder: Path) -> Finding:
    block = os.urandom(2**20)
    begin = time.perf_counter()
    try:
        with (folder / "speed").open("wb") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "write speed",
            "fail",
            f"{PROBE_BYTES / 2**20:.0f} MiB: {error.strerror}",
            "free some space, raise the quota, or set output_dir= to another disk",
        )
    speed = PROBE_BYTES / (time.perf_counter() - begin)
    found = f"{speed / 1e6:,.0f} MB/s with fsync"
    if speed < SLOW_BYTES_PER_S:
        return Finding(
            "write speed",
            "warn",
            found,
            "checkpoints will be slow: raise callbacks.checkpoint.every_n_steps, and "
            "callbacks.requeue.margin_s by the time of a save",
        )
    return Finding("write speed", "ok", found)


def clock_of_files(folder: Path) -> Finding:
    (folder / "clock").write_text("")
    skew = (folder / "clock").stat().st_mtime - time.time()
    found = f"differs by {abs(skew):.1f} s from this machine's"
    if abs(skew) > MAX_SKEW_S:
        return Finding(
            "clock of the file server",
            "warn",
            found,
            "synchronise both with NTP; make and rsync go by these times",
        )
    return Finding("clock of the file server", "ok", found)
