"""A run's folder that was copied without its links, as object stores and `cp -L` do."""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

from ic.checkpoint.folder import read_trainer_state
from ic.files.run_folder import RunFolder


def restore_links(run: RunFolder) -> None:
    """Make `last` and `best` links again where they have become copies of what they pointed to.

    For the process that holds the run's lock.

    Raises:
        ValueError: a copy is not the checkpoint of its step that lies beside it.
        CheckpointError: a copy is no checkpoint.
    """
    for link in (run.last, run.best):
        if not link.is_dir() or link.is_symlink():
            continue
        target = run.checkpoint(int(read_trainer_state(link)["global_step"]))
        copy = link.with_name(f"{link.name}.partial-{os.getpid()}")
        if not target.is_dir():
            link.rename(target)
        elif _is_same(link, target):
            link.rename(copy)
        else:
            raise ValueError(
                f"{link} is a folder, and differs from {target}, of the same step: keep the one "
                "that you want under the name of the step, and remove the other"
            )
        link.symlink_to(target.name)
        shutil.rmtree(copy, ignore_errors=True)


def _is_same(one: Path, other: Path) -> bool:
    names = [sorted(p.relative_to(each) for p in each.rglob("*")) for each in (one, other)]
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False)
        for name in names[0]
        if (one / name).is_file()
    )
