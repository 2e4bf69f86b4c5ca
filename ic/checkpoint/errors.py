"""What goes wrong with checkpoints."""

from __future__ import annotations

from pathlib import Path

from ic.files.run_folder import run_of, saved_step


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used as asked."""


def save_error(target: Path, cause: object) -> CheckpointError:
    """The message of every failed save."""
    return CheckpointError(
        f"could not save the checkpoint {target}: {cause}. Earlier checkpoints are intact; "
        "free some space or set output_dir to another disk, then resume with ckpt_path=last"
    )


def damaged_error(file: Path, cause: object) -> CheckpointError:
    """The message of every file of a checkpoint that cannot be read, with what to use instead."""
    earlier = _checkpoint_before(file.parent)
    instead = "restore it from a copy, or use another checkpoint"
    if earlier is not None:
        instead = f"restore it from a copy, or go back to the checkpoint before it, {earlier}"
    return CheckpointError(f"{file} is truncated or damaged: {cause}; {instead}")


def not_finite_error(folder: Path, name: str) -> CheckpointError:
    """The message of a checkpoint whose weights no training can go on from."""
    earlier = _checkpoint_before(folder)
    instead = "another checkpoint" if earlier is None else f"the checkpoint before it, {earlier}"
    return CheckpointError(
        f"{folder} holds weights that are NaN or infinite, the first in {name}: nothing can be "
        f"trained from it; go back to {instead}"
    )


def _checkpoint_before(folder: Path) -> Path | None:
    """The run's checkpoint of the step before a checkpoint's, or before that of its adapter."""
    for each in (folder, folder.parent):
        run = run_of(each)
        if run is not None:
            now = saved_step(each.resolve())
            steps = [step for step in run.saved_steps() if step < now]
            return run.checkpoint(steps[-1]) if steps else None
    return None
