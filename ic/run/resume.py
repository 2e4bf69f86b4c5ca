"""Where a run starts: from which checkpoint, and whether its configuration is still the same."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.config.run import RunConfig
from ic.files.run_folder import RunFolder
from ic.machine.slurm_job import SlurmJob

# What may differ when a run continues: where and on which kernels it runs, for how long, what it
# shows and keeps.
MAY_CHANGE = (
    "ckpt_path",
    "overwrite",
    "allow_config_change",
    "output_dir",
    "logger",
    "data.num_workers",
    "model.attention",
    "model.norm",
    "model.rope",
    "model.compile",
    "strategy",
    "trainer.max_time",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.log_every_n_steps",
    "callbacks.checkpoint",
    "callbacks.memory",
    "callbacks.profiler",
    "callbacks.progress",
    "callbacks.requeue",
    "callbacks.throughput",
    "callbacks.gpu_utilisation",
    "callbacks.watchdog",
)
_ABSENT = "(absent)"


def starting_checkpoint(config: RunConfig, run_dir: Path) -> Path | None:
    """The checkpoint from which `fit` starts; None for random or `init_from` weights.

    A job that SLURM has started again continues from its own `last`, whatever it was first given.
    `ckpt_path=auto` is `last` if there is one, and the beginning otherwise.

    Raises:
        ValueError: no such checkpoint; the run holds one already; its configuration has changed.
    """
    run = RunFolder(run_dir)
    has_last = run.last.exists()
    job = SlurmJob.current()
    restarted = job is not None and job.restart_count > 0
    wanted = config.ckpt_path
    if restarted or wanted == "auto":
        own = has_last and (restarted or not config.overwrite)
        wanted = "last" if own else None if wanted == "auto" else wanted
    checkpoint = None if wanted is None else run.resolve_checkpoint(wanted)
    if checkpoint is not None and run.owns(checkpoint):
        check_same_configuration(config, run_dir)
        rank_zero_info(f"continuing from {checkpoint}")
    elif has_last and not config.overwrite:
        raise ValueError(
            f"{run_dir} already holds a checkpoint; continue with ckpt_path=last, choose another "
            "run_id=, or begin anew with overwrite=true"
        )
    return checkpoint


def forget_checkpoints(run_dir: Path) -> None:
    """Remove the links `last` and `best`, so that a run begun anew can never resume the old one."""
    run = RunFolder(run_dir)
    for link in (run.last, run.best):
        link.unlink(missing_ok=True)


def check_same_configuration(config: RunConfig, run_dir: Path) -> None:
    """Refuse to continue a run under another configuration, unless `allow_config_change`.

    Raises:
        ValueError: names each key that differs, with both values.
    """
    file = RunFolder(run_dir).config
    if config.allow_config_change or not file.is_file():
        return
    saved = _flatten(yaml.safe_load(file.read_text()))
    given = _flatten(yaml.safe_load(yaml.safe_dump(asdict(config))))
    changed = [
        f"{key}: {saved.get(key, _ABSENT)} -> {given.get(key, _ABSENT)}"
        for key in sorted({*saved, *given})
        if saved.get(key, _ABSENT) != given.get(key, _ABSENT) and not _may_change(key)
    ]
    if changed:
        raise ValueError(
            f"the configuration differs from the one in {file}: {'; '.join(changed)}. Give the "
            "same as before, choose another run_id=, or continue with allow_config_change=true"
        )


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
