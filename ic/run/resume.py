"""Where a run starts: from which checkpoint, and whether its configuration is still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.checkpoint.folder import read_trainer_state
from ic.config.run import RunConfig
from ic.files.results import is_finished
from ic.files.run_folder import RunFolder, run_of, saved_step
from ic.files.saved_config import changed_keys, forgotten_keys, read_config
from ic.machine.slurm_job import SlurmJob

_MOST_SHOWN = 8  # of the keys that have changed


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
        folder = self.checkpoint.resolve()
        if run_of(folder) is not None:
            return saved_step(folder)
        return int(read_trainer_state(folder)["global_step"])  # a folder of the user's naming


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
    elif has_last and not config.overwrite:
        raise ValueError(
            f"{run.path} already holds a checkpoint; continue with ckpt_path=last, choose another "
            "run_id=, or begin anew with overwrite=true"
        )
    return Start(checkpoint, continues)


def begins_again(config: RunConfig) -> bool:
    """Whether a run that was stopped before its first checkpoint takes the same steps again."""
    run, job = config.folder, SlurmJob.current()
    if run.last.exists() or not run.config.is_file() or is_finished(run.results):
        return False
    if config.overwrite and (job is None or not job.restart_count):
        return False
    return not list(changed_keys(read_config(run.config), config))


def nothing_left(config: RunConfig, start: Start) -> str | None:
    """What to say of a run that has trained all its steps and measured everything; else None."""
    run, step = config.folder, start.first_step
    if step is None or not is_finished(run.results):
        return None
    before = read_config(run.config)
    wanted, given_s = config.trainer.max_steps, config.trainer.max_time
    same_time = (before.get("trainer") or {}).get("max_time") == given_s
    if step != max(run.saved_steps()) or list(changed_keys(before, config)):
        return None
    if step < wanted and not (given_s is not None and same_time):
        return None
    done = (
        f"{step:,} of {wanted:,} steps are done"
        if step == wanted
        else f"step {step:,}: the time of trainer.max_time={given_s} is used up"
    )
    return (
        f"{done}, and what the run measured is in {run.results}: nothing is left to do. To train "
        "on, raise trainer.max_steps (or max_time) and add allow_config_change=true"
    )


def forget_results(run: RunFolder) -> None:
    """Remove the links `last` and `best`, what says that the run is finished, and its report.

    So a run that is begun anew can never resume the old one, nor be taken for it.
    """
    for file in (run.last, run.best, run.results, run.report, run.curves):
        file.unlink(missing_ok=True)


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
            f"the configuration differs from the one in {file}: {_listed(changed)}. Continue with "
            f"the run's own by run={run_dir}, begin another by run_id=, or continue all the same "
            "with allow_config_change=true"
        )
    if forgotten := list(forgotten_keys(saved, config)):
        rank_zero_info(
            f"{file} is of another version: this one has no {', '.join(forgotten)}, and continues "
            "without"
        )


def _listed(changed: list[str]) -> str:
    shown = changed[:_MOST_SHOWN]
    more = len(changed) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more else [])])
