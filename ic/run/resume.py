"""Where a run starts: from which checkpoint, and whether its configuration is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.config.run import RunConfig
from ic.files.run_folder import RunFolder, saved_step
from ic.files.saved_config import changed_keys, forgotten_keys, read_config
from ic.machine.slurm_job import SlurmJob


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: its folder; None for random or `init_from` weights.
        continues: the checkpoint is the run's own.
    """

    checkpoint: Path | None = None
    continues: bool = False

    @property
    def first_step(self) -> int | None:
        """The first step of a run that continues; None for one that begins."""
        if self.checkpoint is None or not self.continues:
            return None
        return saved_step(self.checkpoint.resolve())


def starting_checkpoint(config: RunConfig) -> Start:
    """The checkpoint from which `fit` starts.

    A job that SLURM has started again continues from its own `last`, whatever it was first given.
    `ckpt_path=auto` is `last` if there is one, and the beginning otherwise.

    Raises:
        ValueError: no such checkpoint; the run holds one already; its configuration has changed.
    """
    run = config.folder
    has_last = run.last.exists()
    job = SlurmJob.current()
    restarted = job is not None and job.restart_count > 0
    wanted = config.ckpt_path
    if restarted or wanted == "auto":
        own = has_last and (restarted or not config.overwrite)
        wanted = "last" if own else None if wanted == "auto" else wanted
    checkpoint = None if wanted is None else run.resolve_checkpoint(wanted)
    continues = checkpoint is not None and run.owns(checkpoint)
    if continues:
        check_same_configuration(config, run.path)
        rank_zero_info(f"continuing from {checkpoint}")
    elif has_last and not config.overwrite:
        raise ValueError(
            f"{run.path} already holds a checkpoint; continue with ckpt_path=last, choose another "
            "run_id=, or begin anew with overwrite=true"
        )
    return Start(checkpoint, continues)


def forget_checkpoints(run: RunFolder) -> None:
    """Remove the links `last` and `best`, so that a run begun anew can never resume the old one."""
    for link in (run.last, run.best):
        link.unlink(missing_ok=True)


def check_same_configuration(config: RunConfig, run_dir: Path) -> None:
    """Refuse to continue a run under another configuration, unless `allow_config_change`.

    What counts as another one stands in `ic.files.saved_config`.

    Raises:
        ValueError: names each key that differs, with both values.
    """
    file = RunFolder(run_dir).config
    if config.allow_config_change or not file.is_file():
        return
    saved = read_config(file)
    if changed := list(changed_keys(saved, config)):
        raise ValueError(
            f"the configuration differs from the one in {file}: {'; '.join(changed)}. Give the "
            "same as before, choose another run_id=, or continue with allow_config_change=true"
        )
    if forgotten := list(forgotten_keys(saved, config)):
        rank_zero_info(
            f"{file} is of another version: this one has no {', '.join(forgotten)}, and continues "
            "without"
        )
