"""Whether a trainer goes on with its own run, or begins a new one from another's checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer

from ic.files.run_folder import RunFolder


def continues_run(trainer: Trainer) -> bool:
    """Whether the checkpoint that the trainer has loaded is the run's own.

    What a callback has measured before is then a part of what it reports.
    """
    loaded = trainer.ckpt_path
    return loaded is not None and RunFolder(trainer.default_root_dir).owns(Path(loaded))
