"""The stages of a ladder."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        run_id: of every stage's run.
        output_dir: folder of all runs.
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
