"""What goes wrong with checkpoints."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used as asked."""


def save_error(target: Path, cause: object) -> CheckpointError:
    """The message of every failed save."""
    return CheckpointError(
        f"could not save the checkpoint {target}: {cause}. Earlier checkpoints are intact; "
        "free some space or set output_dir to another disk, then resume with ckpt_path=last"
    )
