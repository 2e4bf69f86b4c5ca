"""What an ablation compares, and for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ic.errors import UsageError

# Overrides that come after the variant's.
FIXED = ("callbacks.passkey.at_end=true", "logger.csv=true", "overwrite=true")
# Keys that the verb sets, and where from.
_RESERVED = {
    "seed": "ablation.seeds",
    "trainer.max_time": "ablation.max_time_s",
    "output_dir": "ablation.output_dir",
    "name": "the name in ablation.output",
    "run_id": "the variant's name",
    "ckpt_path": "nowhere: a run starts anew",
    **{override.partition("=")[0]: f"the verb: {override}" for override in FIXED},
}


@dataclass
class AblationVariant:
    """What differs.

    Attributes:
        name: in the table, the plot and, other characters replaced, the run's folder.
        overrides: of `fit`, after those that all variants share.
    """

    name: str = "???"
    overrides: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.,=+@]+", "-", self.name)


@dataclass
class AblationOptions:
    """What to compare, and for how long.

    Attributes:
        variants: in the table's order.
        only: names of the variants to run now; empty for all.
        seeds: each variant is run with each.
        common: overrides of every run.
        max_time_s: training time of each run in seconds of wall clock; null for equal steps, which
            trainer.max_steps in common sets.
        jobs_per_gpu: runs at a time on each visible GPU.
        jobs: runs at a time where there is no GPU, or trainer.accelerator=cpu.
        run_timeout_s: a run that takes longer, evaluation included, is ended and reported.
        output_dir: a run's folder is `<output_dir>/<name of the results file>/<variant>,seed=N`.
        output: results file; the plot stands beside it. What is to be published is named:
            `ablation.output=docs/results/ablation.json`.
        drop_others: begin anew where the results file holds rows of other settings or commits.
        sweep_file: write the overrides of the runs to do, one run a line, and start none; for
            slurm/sweep.sbatch.
    """

    variants: list[AblationVariant] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    common: list[str] = field(default_factory=list)
    max_time_s: int | None = 100
    jobs_per_gpu: int = 1
    jobs: int = 1
    run_timeout_s: float = 1800.0
    output_dir: str = "runs"
    output: str = "runs/ablation.json"
    drop_others: bool = False
    sweep_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_time_s", "jobs_per_gpu", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ablation.{name}={value}: must be at least 1")
        if self.max_time_s is not None and not self.run_timeout_s > self.max_time_s:
            raise ValueError(
                f"ablation.run_timeout_s={self.run_timeout_s:g}: must be above "
                f"ablation.max_time_s={self.max_time_s}, the evaluation comes after the training"
            )
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"ablation.seeds={self.seeds}: one or more, different, from 0 on")
        if not self.output.endswith(".json"):
            raise ValueError(f"ablation.output={self.output!r}: must end in .json")
        folders = [variant.folder for variant in self.variants]
        if repeated := sorted({name for name in folders if folders.count(name) > 1}):
            raise ValueError(
                f"ablation.variants: {', '.join(repeated)}: give each variant its own name"
            )
        names = [variant.name for variant in self.variants]
        for name in self.only:
            if name not in names:
                raise UsageError.unknown("variant in ablation.only", name, names)
        for overrides in (self.common, *(variant.overrides for variant in self.variants)):
            for override in overrides:
                key = override.lstrip("+~").partition("=")[0]
                if key in _RESERVED:
                    raise ValueError(
                        f"ablation: the override {override!r} would be replaced; {key} comes from "
                        f"{_RESERVED[key]}"
                    )


@dataclass
class AblationConfig:
    """The verb `ablation`."""

    ablation: AblationOptions = field(default_factory=AblationOptions)
