"""What a killed process left half-written, and where it is put right."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from ic.files.run_folder import RunFolder

# `ic.files.atomic_write` and `ic.checkpoint.commit` give these names, each with its process's id.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_PARTIAL = re.compile(r".+\.partial-\d+")
_ASIDE = re.compile(r"(.+)\.partial-old-\d+")


def clear_leftovers(run: RunFolder) -> None:
    """Remove half-written files and folders of a run; for the process that holds the run's lock.

    A checkpoint that had stepped aside for another one gets its name back if the other one never
    came. What the verb `evaluate` writes is left alone: it may be writing now.
    """
    evaluations = run.evaluation(0).parent
    for folder in [run.path, *(p for p in run.path.iterdir() if p.is_dir() and p != evaluations)]:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                remove(path)
    if not run.checkpoints.is_dir():
        return
    for path in sorted(run.checkpoints.iterdir()):
        aside = _ASIDE.fullmatch(path.name)
        if aside and not (target := path.with_name(aside[1])).exists():
            path.rename(target)
        elif aside or _PARTIAL.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; one that cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
