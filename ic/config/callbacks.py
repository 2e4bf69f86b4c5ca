"""The group `callbacks`: options of each callback, and the callback that they make.

A new one is a class and a field here, its options in `callbacks/options.py` and the callback beside
them; `conf/callbacks/default.yaml` turns it on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from ic.callbacks.options import (
    CheckpointOptions,
    ContextLengthOptions,
    GpuUtilisationOptions,
    GuardrailsOptions,
    MemoryProfilerOptions,
    PasskeyEvaluationOptions,
    ProfilerOptions,
    SamplesOptions,
    SlurmRequeueOptions,
    SuiteEvaluationOptions,
    ThroughputOptions,
)
from ic.callbacks.prometheus_options import PrometheusOptions
from ic.config.trainer import TrainerConfig
from ic.errors import UsageError
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.files.run_folder import RunFolder
from ic.files.saved_config import MAY_CHANGE
from ic.parallel.options import WatchdogOptions

if TYPE_CHECKING:
    from lightning import Callback


class Surroundings(Protocol):
    """What a callback may ask of the run that it is made for: a `RunConfig`."""

    name: str
    run_id: str
    callbacks: CallbacksConfig
    evaluation: PasskeyGridConfig
    suite: dict[str, Any]
    trainer: TrainerConfig

    @property
    def folder(self) -> RunFolder: ...


class WatchdogConfig(WatchdogOptions):
    def build(self, run: Surroundings) -> Callback:
        import torch

        from ic.parallel.watchdog import Watchdog, record_collectives

        if torch.cuda.is_available():
            record_collectives(run.folder.nccl)
        return Watchdog(self)


class ThroughputConfig(ThroughputOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.throughput import Throughput

        return Throughput(self)


class GpuUtilisationConfig(GpuUtilisationOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.gpu_utilisation import GpuUtilisation

        return GpuUtilisation(self)


class MemoryProfilerConfig(MemoryProfilerOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.memory_profiler import MemoryProfiler

        return MemoryProfiler(self)


class ContextLengthConfig(ContextLengthOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.context_length import AdaptiveContextLength, StagedContextLength

        return StagedContextLength(self) if self.stages else AdaptiveContextLength(self)


class GuardrailsConfig(GuardrailsOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.guardrails import Guardrails

        return Guardrails(self)


class CheckpointConfig(CheckpointOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.checkpoint import FolderCheckpoint

        return FolderCheckpoint(self)


class ProfilerConfig(ProfilerOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.profiler import Profiler

        return Profiler(self)


class SlurmRequeueConfig(SlurmRequeueOptions):
    def build(self, run: Surroundings) -> Callback | None:
        """None without checkpoints: there is nothing to come back to."""
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        from ic.callbacks.requeue import SlurmRequeue
        from ic.machine.slurm_job import SlurmJob

        job = SlurmJob.current()
        if run.callbacks.checkpoint is not None:
            return SlurmRequeue(self, job)
        if job is not None:
            rank_zero_warn(
                "callbacks.checkpoint=null: this job cannot be requeued, nothing is saved"
            )
        return None


class PrometheusConfig(PrometheusOptions):
    def build(self, run: Surroundings) -> Callback:
        """Raises UsageError without prometheus_client."""
        try:
            from ic.callbacks.prometheus import Prometheus
        except ImportError as error:
            raise UsageError(
                f"callbacks=prometheus: {error}; install 'infinite-context[monitoring]', or leave "
                "it out"
            ) from error
        return Prometheus(self, run.name, run.run_id)


class PasskeyEvaluationConfig(PasskeyEvaluationOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.evaluation import SuiteEvaluation
        from ic.evaluation.registry import build_suite

        return SuiteEvaluation(self, [build_suite("passkey", run.evaluation)])


class SuiteEvaluationConfig(SuiteEvaluationOptions):
    def build(self, run: Surroundings) -> Callback | None:
        """None without suites."""
        from ic.callbacks.evaluation import SuiteEvaluation
        from ic.evaluation.registry import build_suite

        suites = [build_suite(name, options) for name, options in run.suite.items()]
        return SuiteEvaluation(self, suites) if suites else None


class SamplesConfig(SamplesOptions):
    def build(self, run: Surroundings) -> Callback:
        from ic.callbacks.samples import Samples

        return Samples(self)


@dataclass
class CallbacksConfig:
    """Callbacks, in the order in which their hooks run; `null` turns one off.

    Throughput comes before what it must not time. The checkpoint's hooks run last wherever it
    stands, Lightning sees to that: after the evaluation, so that neither changes what the other
    sees.

    Attributes:
        prometheus: offers the run's metrics to Prometheus (docs/monitoring.md).
        passkey: evaluates the passkey grid of `evaluation`.
        suites: evaluates the suites that were chosen with `suite`.
        loss_curve: a picture of the losses, `loss.png` in the run's folder.
        progress: the line, or lines, that show how far training is.
    """

    watchdog: WatchdogConfig | None = field(default=None, metadata=MAY_CHANGE)
    throughput: ThroughputConfig | None = field(default=None, metadata=MAY_CHANGE)
    gpu_utilisation: GpuUtilisationConfig | None = field(default=None, metadata=MAY_CHANGE)
    memory: MemoryProfilerConfig | None = field(default=None, metadata=MAY_CHANGE)
    context_length: ContextLengthConfig | None = None
    guardrails: GuardrailsConfig | None = None
    checkpoint: CheckpointConfig | None = field(default=None, metadata=MAY_CHANGE)
    profiler: ProfilerConfig | None = field(default=None, metadata=MAY_CHANGE)
    requeue: SlurmRequeueConfig | None = field(default=None, metadata=MAY_CHANGE)
    prometheus: PrometheusConfig | None = field(default=None, metadata=MAY_CHANGE)
    passkey: PasskeyEvaluationConfig | None = None
    suites: SuiteEvaluationConfig | None = field(default=None, metadata=MAY_CHANGE)
    samples: SamplesConfig | None = field(default=None, metadata=MAY_CHANGE)
    loss_curve: bool = field(default=True, metadata=MAY_CHANGE)
    progress: bool = field(default=True, metadata=MAY_CHANGE)

    def build(self, run: Surroundings) -> list[Callback]:
        """The callbacks that are turned on, in order."""
        from ic.callbacks.before_and_after import BeforeAndAfter
        from ic.callbacks.final_losses import FinalLosses
        from ic.callbacks.loss_curve import LossCurve
        from ic.callbacks.progress import TrainingProgress

        options: list[Any] = [getattr(self, each.name) for each in fields(self)]
        built: list[Callback | None] = [
            each.build(run) for each in options if hasattr(each, "build")
        ]
        built.append(FinalLosses())
        if run.trainer.num_sanity_val_steps:
            built.append(BeforeAndAfter())
        if self.loss_curve:
            built.append(LossCurve())
        if self.progress:
            built.append(TrainingProgress())
        return [callback for callback in built if callback is not None]
