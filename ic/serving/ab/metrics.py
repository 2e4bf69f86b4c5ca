"""What Prometheus reads of the router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ic.serving.ab.backends import Backends
    from ic.serving.ab.experiment import Experiment

_SECONDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560,
)  # fmt: skip
# The version of requests that no version was asked for: they were refused before.
NO_VERSION = "none"


class _OfTheExperiment(Collector):
    """Reads the split and the servers when Prometheus asks."""

    def __init__(self, experiment: Experiment, backends: Backends) -> None:
        self._experiment = experiment
        self._backends = backends

    def collect(self) -> Iterator[Metric]:
        weights = self._experiment.split.weights
        gauges: tuple[tuple[str, str, Callable[[str], float]], ...] = (
            ("ic_router_weight", "share of the users, in per cent", weights.__getitem__),
            (
                "ic_router_healthy",
                "1 if a server of the version is sent requests",
                self._backends.is_healthy,
            ),
            (
                "ic_router_in_flight",
                "requests that servers of the version work on",
                lambda version: sum(each.in_flight for each in self._backends.of[version]),
            ),
        )
        for name, meaning, value in gauges:
            gauge = GaugeMetricFamily(name, meaning, labels=["version"])
            for version in weights:
                gauge.add_metric([version], float(value(version)))
            yield gauge
        back = CounterMetricFamily(
            "ic_router_rollbacks", "times that guardrails took a version out", labels=["version"]
        )
        for version, times in self._experiment.rollbacks.items():
            back.add_metric([version], times)
        yield back
        yield CounterMetricFamily(
            "ic_router_unlogged", "rows of the log that were lost", self._experiment.unlogged
        )


class RouterMetrics:
    """The counts of one router."""

    def __init__(self, experiment: Experiment, backends: Backends) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfTheExperiment(experiment, backends))
        self._requests = Counter(
            "ic_router_requests",
            "responses by the version that answered and HTTP status",
            ("version", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "ic_router_request_seconds",
            "from the request's arrival to the last byte, by the version that answered",
            ("version",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._retries = Counter(
            "ic_router_retries",
            "requests that a server failed and another one was asked for",
            ("version",),
            registry=self._registry,
        )
        for version in experiment.split.versions:
            self._seconds.labels(version)
            self._retries.labels(version)

    def response(self, version: str, status: int) -> None:
        self._requests.labels(version, status).inc()

    def took(self, version: str, seconds: float) -> None:
        self._seconds.labels(version).observe(seconds)

    def retried(self, version: str) -> None:
        """A server of the version failed, and another one is asked."""
        self._retries.labels(version).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
