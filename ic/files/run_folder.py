"""Where everything of a run lies."""

from __future__ import annotations

import re
from pathlib import Path

_STEP_FOLDER = re.compile(r"step=(\d+)")


def resolve_checkpoint(run_dir: Path, ckpt_path: str) -> Path:
    """`last` or `best` of a run, or a path.

    Raises:
        ValueError: the run has no such checkpoint.
    """
    if ckpt_path not in ("last", "best"):
        return Path(ckpt_path)
    folder = run_dir / "checkpoints" / ckpt_path
    if not folder.is_dir():
        raise ValueError(
            f"ckpt_path={ckpt_path}: {run_dir} holds no such checkpoint; leave ckpt_path out to "
            "begin anew, or check name= and run_id="
        )
    return folder.resolve()


def saved_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder of them, in order."""
    found = (_STEP_FOLDER.fullmatch(path.name) for path in folder.glob("step=*"))
    return sorted(int(match[1]) for match in found if match)


def saved_step(folder: Path) -> int:
    """The step of a checkpoint folder of a run, from its name."""
    return int(folder.name.removeprefix("step="))
