"""What `scaling` measures, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.errors import UsageError, check_once


@dataclass
class ScalingCase:
    """A run to measure.

    Attributes:
        name: names the row, together with the number of GPUs.
        overrides: of `fit`; `{devices}` stands for the number of GPUs.
        devices: one row for each number; empty for 2, 4, 8, ... up to what the host has.
        warmup_steps, timed_steps, case_timeout_s: where they differ from the other cases'.
    """

    name: str = "???"
    overrides: list[str] = field(default_factory=list)
    devices: list[int] = field(default_factory=list)
    warmup_steps: int | None = None
    timed_steps: int | None = None
    case_timeout_s: float | None = None

    def __post_init__(self) -> None:
        for number in self.devices:
            if number < 1:
                raise ValueError(
                    f"scaling.cases: {self.name!r}: devices={self.devices}: each at least 1"
                )
        check_once(f"scaling.cases: {self.name!r}: devices", self.devices)
        for name, least in (("warmup_steps", 0), ("timed_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"scaling.cases: {self.name!r}: {name}={value}: at least {least}")
        if self.case_timeout_s is not None and not self.case_timeout_s > 0:
            raise ValueError(
                f"scaling.cases: {self.name!r}: case_timeout_s={self.case_timeout_s}: above 0"
            )


@dataclass
class ScalingOptions:
    """What to measure, and for how long.

    Attributes:
        cases: in this order.
        only: names of the cases to run; empty for all.
        common: overrides of every case; a case's own come after them.
        baseline: name of the case that `ratio_to_baseline` divides by.
        warmup_steps: optimizer steps that are not timed: compilation, autotuning, the allocator.
        timed_steps: optimizer steps after them.
        case_timeout_s: a case that takes longer is ended and reported.
        output: results file; the plot stands beside it. What is to be published is named:
            `scaling.output=docs/results/scaling.json`.
    """

    cases: list[ScalingCase] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    common: list[str] = field(default_factory=list)
    baseline: str = "ddp over gloo"
    warmup_steps: int = 3
    timed_steps: int = 6
    case_timeout_s: float = 300.0
    output: str = "runs/scaling.json"

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("timed_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"scaling.{name}={getattr(self, name)}: must be at least {least}")
        if not self.case_timeout_s > 0:
            raise ValueError(f"scaling.case_timeout_s={self.case_timeout_s}: must be above 0")
        if not self.output.endswith(".json"):
            raise ValueError(f"scaling.output={self.output!r}: must end in .json")
        names = [case.name for case in self.cases]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"scaling.cases: {', '.join(repeated)}: give each case its own name")
        for name in self.only:
            if name not in names:
                raise UsageError.unknown("case in scaling.only", name, names)

    def selected(self) -> list[ScalingCase]:
        """The cases to run."""
        return [case for case in self.cases if not self.only or case.name in self.only]


@dataclass
class ScalingConfig:
    """The verb `scaling`."""

    scaling: ScalingOptions = field(default_factory=ScalingOptions)
