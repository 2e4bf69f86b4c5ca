"""What each callback is asked. Imports no PyTorch, so that help and errors come at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from ic.errors import check_once


@dataclass
class CheckpointOptions:
    """When to save, and what to keep.

    Attributes:
        every_n_steps: steps between saves of `last`.
        keep_last: number of the newest checkpoints that stay.
        keep_every_n_steps: steps whose checkpoints stay for good; 0 keeps none.
        monitor: metric of the validation that decides `best`; null keeps no best.
        mode: `max` or `min`.
    """

    every_n_steps: int = 250
    keep_last: int = 1
    keep_every_n_steps: int = 0
    monitor: str | None = "val/loss"
    mode: str = "min"

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(
                f"callbacks.checkpoint.every_n_steps={self.every_n_steps}: must be at least 1"
            )
        if self.keep_last < 1:
            raise ValueError(f"callbacks.checkpoint.keep_last={self.keep_last}: must be at least 1")
        if self.keep_every_n_steps < 0 or self.keep_every_n_steps % self.every_n_steps:
            raise ValueError(
                f"callbacks.checkpoint.keep_every_n_steps={self.keep_every_n_steps}: 0, or a "
                f"multiple of every_n_steps={self.every_n_steps}"
            )
        if self.mode not in ("max", "min"):
            raise ValueError(f"callbacks.checkpoint.mode={self.mode!r}: choose max or min")


@dataclass
class ContextLengthOptions:
    """Doubles the context length once answers are mastered, or changes it at given steps.

    Attributes:
        stages: pairs of an optimizer step and the length in tokens from there on, such as
            [[0,32768],[150,131072]]; the length then depends on the step alone. Empty: it doubles
            by the options below.
        start_length: first length in tokens.
        threshold: moving average of `train/answer_accuracy` at which to double.
        check_every_n_steps: how often to look.
        new_weight: weight of the newest step in the moving average.
    """

    stages: list[list[int]] = field(default_factory=list)
    start_length: int = 256
    threshold: float = 0.95
    check_every_n_steps: int = 10
    new_weight: float = 0.2

    def __post_init__(self) -> None:
        if self.start_length < 128:
            raise ValueError(
                f"callbacks.context_length.start_length={self.start_length}: must be at least 128"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"callbacks.context_length.threshold={self.threshold}: must be between 0 and 1"
            )
        if self.check_every_n_steps < 1:
            raise ValueError(
                "callbacks.context_length.check_every_n_steps="
                f"{self.check_every_n_steps}: must be at least 1"
            )
        if not 0 < self.new_weight <= 1:
            raise ValueError(
                f"callbacks.context_length.new_weight={self.new_weight}: must be in (0, 1]"
            )
        if self.stages:
            self._check_stages()

    def _check_stages(self) -> None:
        key = f"callbacks.context_length.stages={self.stages}"
        if any(len(stage) != 2 for stage in self.stages):
            raise ValueError(f"{key}: each is a step and a length, such as [0,32768]")
        steps = [step for step, _ in self.stages]
        if steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(
                f"{key}: the first begins at step 0, and each later than the one before"
            )
        if min(length for _, length in self.stages) < 2:
            raise ValueError(f"{key}: a length must be at least 2 tokens")
        doubling = {each.name: each.default for each in fields(self) if each.name != "stages"}
        given = {name: getattr(self, name) for name in doubling}
        if changed := [name for name, value in given.items() if value != doubling[name]]:
            defaults = [f"callbacks.context_length.{name}={doubling[name]}" for name in changed]
            raise ValueError(
                f"{key}: the lengths are given and nothing doubles, but "
                f"{', '.join(f'{name}={given[name]}' for name in changed)} would say when; take "
                f"the stages out, or (an experiment may have set them) add {' '.join(defaults)}"
            )


@dataclass
class GpuUtilisationOptions:
    """When and how often to ask.

    Attributes:
        warmup_steps: optimizer steps of this process before the first sample.
        every_s: seconds between samples.
    """

    warmup_steps: int = 3
    every_s: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(
                f"callbacks.gpu_utilisation.warmup_steps={self.warmup_steps}: must be at least 0"
            )
        if not self.every_s > 0:
            raise ValueError(f"callbacks.gpu_utilisation.every_s={self.every_s}: must be above 0")


@dataclass
class GuardrailsOptions:
    """What counts as bad, and how much of it is borne.

    Attributes:
        loss_threshold: z-score of the loss from which a step is bad; null looks for non-finite
            values alone.
        grad_norm_threshold: likewise of the gradient norm, whose good values vary more.
        window_steps: good steps that the median is taken over; begun anew when a curriculum changes
            the context length.
        min_steps: good steps before a spike can be told.
        max_in_a_row: bad steps in a row that lead to a rollback.
        max_rollbacks: rollbacks of one run; the next ends it.
    """

    loss_threshold: float | None = 20.0
    grad_norm_threshold: float | None = 100.0
    window_steps: int = 100
    min_steps: int = 50
    max_in_a_row: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name in ("loss_threshold", "grad_norm_threshold"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"callbacks.guardrails.{name}={value}: must be above 0, or null")
        for name, least in (("min_steps", 2), ("max_in_a_row", 1), ("max_rollbacks", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"callbacks.guardrails.{name}={getattr(self, name)}: must be at least {least}"
                )
        if self.window_steps < self.min_steps:
            raise ValueError(
                f"callbacks.guardrails.window_steps={self.window_steps}: must be at least "
                f"min_steps={self.min_steps}"
            )


@dataclass
class MemoryProfilerOptions:
    """How often to measure and what to keep.

    Attributes:
        first_steps: optimizer steps measured at the start of the run.
        every_n_steps: after them, measure every n-th step; 0 for none. A measured step walks all
            parameters a few times and puts a hook on each; the others cost a comparison.
        oom_snapshot: write `memory/oom_snapshot.pickle` when CUDA runs out of memory.
        oom_history_entries: allocations kept with their stack for that snapshot; 0 for none.
        reset_host_peak: on CPU, reset the process's peak counter for each phase (see
            `ProcessMeter`).
    """

    first_steps: int = 3
    every_n_steps: int = 100
    oom_snapshot: bool = True
    oom_history_entries: int = 50_000
    reset_host_peak: bool = True

    def __post_init__(self) -> None:
        for name in ("first_steps", "every_n_steps", "oom_history_entries"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"callbacks.memory.{name}={getattr(self, name)}: must be at least 0"
                )


@dataclass
class SuiteEvaluationOptions:
    """When to evaluate.

    Attributes:
        every_n_steps: steps between cheap evaluations; 0 for none.
        cheap_lengths: their lengths; each at most the current context length counts.
        cheap_samples: their samples of each cell.
        at_end: evaluate the suites as they are configured when training ends.
    """

    KEY: ClassVar[str] = "callbacks.suites"

    every_n_steps: int = 0
    cheap_lengths: list[int] | None = None
    cheap_samples: int = 1
    at_end: bool = True

    def __post_init__(self) -> None:
        if self.every_n_steps < 0:
            raise ValueError(f"{self.KEY}.every_n_steps={self.every_n_steps}: must be at least 0")
        if self.cheap_samples < 1:
            raise ValueError(f"{self.KEY}.cheap_samples={self.cheap_samples}: must be at least 1")
        if self.every_n_steps and not self.cheap_lengths:
            raise ValueError(f"{self.KEY}.cheap_lengths: needed with every_n_steps above 0")
        check_once(f"{self.KEY}.cheap_lengths", self.cheap_lengths or [])


@dataclass
class PasskeyEvaluationOptions(SuiteEvaluationOptions):
    """When to evaluate the passkey grid of `evaluation`."""

    KEY: ClassVar[str] = "callbacks.passkey"


@dataclass
class ProfilerOptions:
    """Which micro-batches to profile.

    Attributes:
        wait_steps: left alone at the start.
        warmup_steps: profiled and thrown away: the profiler's own start-up.
        active_steps: profiled and kept.
        num_kernels: rows of the table.
        memory_history_entries: allocations of the CUDA snapshot.
    """

    wait_steps: int = 8
    warmup_steps: int = 2
    active_steps: int = 3
    num_kernels: int = 30
    memory_history_entries: int = 100_000

    def __post_init__(self) -> None:
        for name, least in (
            ("wait_steps", 0),
            ("warmup_steps", 1),
            ("active_steps", 1),
            ("num_kernels", 1),
            ("memory_history_entries", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"callbacks.profiler.{name}={getattr(self, name)}: must be at least {least}"
                )


@dataclass
class SamplesOptions:
    """What to write while training, and when.

    Attributes:
        prompts: texts to continue.
        every_n_validations: validations from one time to the next.
        max_new_tokens: tokens after which a text ends at the latest.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: share of the probability that the tokens to sample from hold together.
        seed: of sampling, the same each time.
    """

    prompts: list[str] = field(default_factory=lambda: ["The "])
    every_n_validations: int = 1
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError(
                f"callbacks.samples.prompts={self.prompts}: give at least one text, none of them "
                "empty, or set callbacks.samples=null"
            )
        for name, least in (("every_n_validations", 1), ("max_new_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"callbacks.samples.{name}={getattr(self, name)}: must be at least {least}"
                )
        if not 0 <= self.temperature <= 2:
            raise ValueError(
                f"callbacks.samples.temperature={self.temperature}: must be a number from 0 to 2 "
                "(0 takes the likeliest token)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"callbacks.samples.top_p={self.top_p}: must be in (0, 1]")


@dataclass
class SlurmRequeueOptions:
    """When to give up the machines, and how often to come back.

    Attributes:
        margin_s: seconds before the job's time limit at which to save and requeue if no signal has
            come; the longest step so far is added, since the next chance is one step away.
        max_restarts: restarts after which a job stops, with a checkpoint, instead of requeueing.
    """

    margin_s: float = 180.0
    max_restarts: int = 20

    def __post_init__(self) -> None:
        if self.margin_s < 0:
            raise ValueError(f"callbacks.requeue.margin_s={self.margin_s}: must be at least 0")
        if self.max_restarts < 0:
            raise ValueError(
                f"callbacks.requeue.max_restarts={self.max_restarts}: must be at least 0"
            )


@dataclass
class ThroughputOptions:
    """What counts and how often the clock is read.

    Attributes:
        warmup_steps: optimizer steps left out at the start of the process and of each new context
            length.
        window_steps: timed steps behind the logged values.
        sync_every_n_steps: on CUDA, read the events every so many steps and at the steps at which
            the trainer logs, up to the step before the current one: waiting for that leaves the GPU
            a step's work, so it does not run dry. On CPU each step is read at once.
        peak_bf16_flops: peak of one device, for GPUs that are not in `ic.machine.gpus`.
    """

    warmup_steps: int = 3
    window_steps: int = 20
    sync_every_n_steps: int = 10
    peak_bf16_flops: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("window_steps", 1), ("sync_every_n_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"callbacks.throughput.{name}={getattr(self, name)}: must be at least {least}"
                )
        if self.peak_bf16_flops is not None and self.peak_bf16_flops <= 0:
            raise ValueError(
                f"callbacks.throughput.peak_bf16_flops={self.peak_bf16_flops}: "
                "must be above 0, or null to look the device up"
            )
