"""The metrics of a training run in Prometheus's words. docs/monitoring.md has them as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LABELS = ("experiment", "run_id", "rank")
# Name -> meaning. Rank 0 alone tells of what is the whole run's, so that no sum counts it twice.
OF_THE_RUN: dict[str, str] = {
    "ic_train_loss": "training loss at the last logged step, nats per token",
    "ic_train_tokens_total": "tokens that all devices have trained on since the run began",
    "ic_train_tokens_per_second": "of all devices, over the throughput callback's window",
    "ic_train_mfu_ratio": "model FLOPs utilisation over the throughput callback's window",
    "ic_train_gradient_norm": "norm of all gradients at the newest step, before clipping",
    "ic_train_learning_rate": "of the first parameter group, at the last logged step",
    "ic_train_context_length_tokens": "tokens in a row of the batch, at the last logged step",
    "ic_train_checkpoint_timestamp_seconds": "when the newest checkpoint was on disk",
    "ic_train_start_timestamp_seconds": "when this process began to train",
    "ic_train_bad_steps_total": "steps that the guardrails skipped since the process began",
    "ic_train_rollbacks_total": "returns to a checkpoint after bad steps in a row, of the run",
    "ic_train_requeues_total": "how often SLURM has started the job again",
}
OF_THE_RANK: dict[str, str] = {
    "ic_train_step": "optimizer steps that the run has taken",
    "ic_train_last_step_timestamp_seconds": "when the newest step ended, or training began",
    "ic_train_step_seconds": "median step over the throughput callback's window",
    "ic_train_data_wait_ratio": "share of the steps' time before their batch was there",
    "ic_train_gpu_memory_bytes": "peak of the run: of the GPU's allocator, on a CPU of the process",
    "ic_train_gpu_memory_limit_bytes": "memory of the GPU; on a CPU, what the process may use",
    "ic_train_evaluating": "1 while something else than training runs: validation, suites",
}


class TrainingMetrics(Collector):
    """Turns a run's values into Prometheus's families whenever they are asked for.

    Args:
        labels: experiment, run_id and rank, which every sample has.
        about: labels of `ic_train_info` beside them: node, device, and so on.
        values: what there is to tell now, by the metrics' names.
    """

    def __init__(
        self,
        labels: tuple[str, str, str],
        about: Mapping[str, str],
        values: Callable[[], Mapping[str, float]],
    ) -> None:
        self._labels = labels
        self._about = about
        self._values = values

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "ic_train_info", "where this process runs", labels=(*_LABELS, *self._about)
        )
        info.add_metric((*self._labels, *self._about.values()), 1)
        yield info
        values = self._values()
        for name, meaning in (OF_THE_RUN | OF_THE_RANK).items():
            if name not in values:
                continue
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, meaning, labels=_LABELS)
            family.add_metric(self._labels, values[name])
            yield family
