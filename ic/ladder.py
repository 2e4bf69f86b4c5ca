"""The ladder: experiments run one after another, each from the weights of the one before."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

# What a stage can hand to the next, and what begins anew there.
KEEPABLE = ("weights",)
STATE = ("weights", "optimizer", "schedule", "step", "data_position", "curriculum")


@dataclass
class LadderStage:
    """One stage.

    Attributes:
        experiment: its experiment.
        keep: what it takes over from the stage before.
        reset: everything else, so that the file says all of it.
    """

    experiment: str = "???"
    keep: list[str] = field(default_factory=lambda: ["weights"])
    reset: list[str] = field(default_factory=lambda: list(STATE[1:]))


@dataclass
class LadderConfig:
    """The verb `ladder`.

    Attributes:
        stages: in order; the first begins from random weights.
        overrides: of every stage's `fit`.
    """

    stages: list[LadderStage] = field(default_factory=list)
    run_id: str = "default"
    output_dir: str = "runs"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for i, stage in enumerate(self.stages):
            where = f"stages[{i}] ({stage.experiment})"
            if sorted(stage.keep + stage.reset) != sorted(STATE):
                raise ValueError(
                    f"{where}: keep={stage.keep} and reset={stage.reset} must name each of "
                    f"{', '.join(STATE)} once"
                )
            unknown = set(stage.keep) - set(KEEPABLE)
            if unknown:
                raise ValueError(
                    f"{where}: keep={stage.keep}: only {', '.join(KEEPABLE)} can be kept; to go on "
                    "with a stage's optimizer, resume it with fit ckpt_path=last"
                )
            if i == 0 and stage.keep:
                raise ValueError(f"{where}: keep={stage.keep}: the first stage has none before it")


def run_ladder(config: LadderConfig) -> int:
    """Run the stages that are not finished; an interrupted one goes on from its last checkpoint."""
    before: Path | None = None
    for number, stage in enumerate(config.stages, 1):
        run = Path(config.output_dir) / stage.experiment / config.run_id
        title = f"stage {number} of {len(config.stages)}, {stage.experiment}"
        if (run / "results.json").is_file():
            rank_zero_info(f"{title}: finished, see {run}")
        else:
            command = stage_command(config, stage, run, before)
            rank_zero_info(f"{title}: python -m ic {' '.join(command)}")
            code = subprocess.run([sys.executable, "-m", "ic", *command], check=False).returncode
            if code:
                return code
        before = run
    return 0


def stage_command(
    config: LadderConfig, stage: LadderStage, run: Path, before: Path | None
) -> list[str]:
    """Arguments of the `fit` of a stage."""
    command = [
        "fit", f"experiment={stage.experiment}", f"name={stage.experiment}",
        f"run_id={config.run_id}", f"output_dir={config.output_dir}", *config.overrides,
    ]  # fmt: skip
    if (run / "checkpoints" / "last").exists():
        command.append("ckpt_path=last")
    elif "weights" in stage.keep:
        assert before is not None
        command.append(f"model.init_from={before / 'checkpoints' / 'last'}")
    return command
