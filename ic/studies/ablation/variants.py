"""The runs of an ablation: composed, checked, and recognised when they are finished."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ic.config.compose import compose_config
from ic.config.flags import split_flags
from ic.config.run import RunConfig
from ic.files.atomic_write import replacing
from ic.files.results import is_finished, read_json
from ic.files.run_folder import RunFolder
from ic.studies.ablation.options import FIXED, AblationOptions

# A run that a job of the sweep made is the same run whatever these say.
_HOW_IT_STARTED = ("ckpt_path", "overwrite", "allow_config_change")


@dataclass(frozen=True)
class PlannedRun:
    """A variant and seed.

    Attributes:
        overrides: all but the seed; with it and the commit, what identifies the run.
        arguments: of its `fit`.
        config: what they come to.
        folder: its run directory.
    """

    variant: str
    seed: int
    overrides: list[str]
    arguments: list[str]
    config: RunConfig
    folder: Path

    @property
    def row(self) -> dict[str, Any]:
        """The part of its row that is known before it runs."""
        return {"variant": self.variant, "seed": self.seed, "overrides": self.overrides}

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def identity(self) -> str:
        return identity(self.row)

    def is_finished(self, commit: str) -> bool:
        """Whether its folder holds the result of this very run at this commit.

        A job of the sweep left it there, or an ablation that was killed before it wrote the row.
        """
        file = RunFolder(self.folder).results
        results = read_json(file)
        return (
            is_finished(file)
            and results["commit"] == commit
            and _comparable(results["config"]) == _comparable(asdict(self.config))
        )


def identity(row: dict[str, Any]) -> str:
    """What says, together with the commit, that a row is a run's."""
    return json.dumps([row["overrides"], row["seed"]])


def plan_runs(options: AblationOptions) -> list[PlannedRun]:
    """Every run, seed by seed, so that each variant has one early; overrides composed and checked.

    Raises:
        ValueError: overrides that do not compose; variants that are the same, or that would be
            asked different questions.
    """

    if not options.variants:
        raise ValueError(
            "ablation.variants is empty: give at least one {name: ..., overrides: [...]}"
        )
    name = Path(options.output).stem
    runs: list[PlannedRun] = []
    for seed in options.seeds:
        for variant in options.variants:
            limit = f"trainer.max_time={_max_time(options.max_time_s)}"
            overrides = [*options.common, *variant.overrides, limit]
            run_id = f"{variant.folder},seed={seed}"
            arguments = [
                *overrides,
                f"seed={seed}",
                *FIXED,
                f"name={name}",
                f"run_id={run_id}",
                f"output_dir={options.output_dir}",
            ]
            try:
                config, _ = compose_config("fit", RunConfig, split_flags(arguments)[1])
            except ValueError as error:
                raise ValueError(f"ablation, variant {variant.name!r}: {error}") from error
            folder = Path(options.output_dir) / name / run_id
            runs.append(PlannedRun(variant.name, seed, overrides, arguments, config, folder))
    variants: dict[str, str] = {}
    for run in runs:
        if (same := variants.setdefault(run.identity, run.variant)) != run.variant:
            raise ValueError(f"ablation: variants {same!r} and {run.variant!r} are the same run")
        if run.config.evaluation != runs[0].config.evaluation:
            raise ValueError(
                f"ablation, variant {run.variant!r}: its evaluation is not that of "
                f"{runs[0].variant!r}; set evaluation in ablation.common alone"
            )
        steps = run.config.trainer.max_steps
        if options.max_time_s is None and steps != runs[0].config.trainer.max_steps:
            raise ValueError(
                f"ablation, variant {run.variant!r}: trainer.max_steps={steps}, but "
                f"{runs[0].variant!r} has {runs[0].config.trainer.max_steps}; with "
                "ablation.max_time_s=null runs take equal steps: set it in ablation.common alone"
            )
    return runs


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    as_read = json.loads(json.dumps(config))
    return {key: value for key, value in as_read.items() if key not in _HOW_IT_STARTED}


def write_sweep(path: Path, todo: Iterable[PlannedRun]) -> None:
    """The arguments of each run, a line a run.

    Raises:
        ValueError: an override that `slurm/sweep.sbatch` would take apart at spaces.
    """
    lines = []
    for run in todo:
        for override in run.arguments:
            if re.search(r"[\s'\"\\]", override):
                raise ValueError(
                    f"ablation, variant {run.variant!r}: {override!r} holds a space, quote or "
                    "backslash, which a line of slurm/sweep.sbatch cannot; write it without"
                )
        lines.append(" ".join(run.arguments) + "\n")
    with replacing(path) as partial:
        partial.write_text("".join(lines))


def _max_time(seconds: int | None) -> str:
    """As `trainer.max_time` wants it."""
    if seconds is None:
        return "null"
    days, rest = divmod(seconds, 86400)
    return f"{days:02d}:{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
