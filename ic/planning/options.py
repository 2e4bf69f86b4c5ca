"""What the verb `plan` is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ic.config.run import RunConfig
from ic.machine.gpus import GPUS

PLAN_STRATEGIES = ("ddp", "fsdp", "fsdp2")


@dataclass
class PlanOptions:
    """The machine to plan for, and what to do.

    Attributes:
        gpu: type of GPU, a name of `ic.machine.gpus.GPUS`.
        num_gpus: GPUs of the whole run; null for `trainer.devices` x `trainer.num_nodes`.
        strategy: `ddp`, `fsdp` or `fsdp2`; null for the run's (`auto` is `ddp`).
        context_parallel_size: GPUs that share a sequence; null for the run's.
        liger: the GPU machine has Liger's kernels (the extra `gpu`).
        measure: run a few steps of each case on this machine's GPU and write prediction and
            measurement to `output`.
        cache: allocate the caches of the 1B shape on this machine's GPU and write `output`.
        compare: results files of `scaling`; predict the memory of their runs and write prediction
            and measurement to `output`.
        cases: YAML list of the cases to measure; null for `ic/planning/cases.yaml`.
        output: JSON file of `measure`, `cache` and `compare`; null for `runs/plan-memory.json`,
            `runs/cache-memory.json` and `runs/plan-scaling.json`. What is to be published is named:
            `plan.output=docs/results/plan-memory.json`.
    """

    gpu: str = "h100"
    num_gpus: int | None = None
    strategy: str | None = None
    context_parallel_size: int | None = None
    liger: bool = True
    measure: bool = False
    cache: bool = False
    compare: list[str] = field(default_factory=list)
    cases: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"plan.gpu={self.gpu!r}: choose one of {', '.join(GPUS)}")
        if self.strategy is not None and self.strategy not in PLAN_STRATEGIES:
            raise ValueError(
                f"plan.strategy={self.strategy!r}: choose one of {', '.join(PLAN_STRATEGIES)}"
            )
        for name in ("num_gpus", "context_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"plan.{name}={value}: must be at least 1")
        if self.num_gpus and self.num_gpus % (self.context_parallel_size or 1):
            raise ValueError(
                f"plan.context_parallel_size={self.context_parallel_size}: must divide "
                f"plan.num_gpus={self.num_gpus}"
            )
        if self.output is not None and not self.output.endswith(".json"):
            raise ValueError(f"plan.output={self.output!r}: must end in .json")

    def output_file(self, name: str) -> Path:
        """Where a measurement goes that writes `name` unless told otherwise."""
        return Path(self.output) if self.output else Path("runs") / name


@dataclass
class PlanConfig(RunConfig):
    """The verb `plan`: a run, and the machine to plan it for.

    Attributes:
        json: print the plan as JSON instead of tables.
    """

    plan: PlanOptions = field(default_factory=PlanOptions)
    json: bool = False
