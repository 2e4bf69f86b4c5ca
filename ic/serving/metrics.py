"""What Prometheus reads: vLLM's names, with `ic:` for `vllm:`, where both count alike.

Every sample has the labels of vLLM: `model_name`, the name that clients ask for, and `engine`, the
number of a data-parallel rank, here always 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ic.inference.engine.request import Finish
from ic.inference.engine.stats import EngineStats

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
    2.5, 5, 10, 20, 40, 80,
)  # fmt: skip
_WHOLE_S = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
    1920, 7680,
)  # fmt: skip
# (name, meaning, value): of the moment, and counted since the start.
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("ic:num_requests_running", "requests in the batch", lambda s: s.running),
    ("ic:num_requests_waiting", "requests that wait for a place in the batch", lambda s: s.waiting),
    (
        "ic:kv_cache_usage_perc",
        "share of the cache's pages that requests hold, 1 for all",
        lambda s: s.pages_used / s.pages_total,
    ),
    ("ic:cache_pages_total", "pages of the cache", lambda s: s.pages_total),
    ("ic:cache_pages_used", "pages that requests hold", lambda s: s.pages_used),
    (
        "ic:cache_pages_cached",
        "free pages kept for prompts that begin alike",
        lambda s: s.pages_cached,
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "ic:num_preemptions",
        "requests that gave their pages back for a while",
        lambda s: s.preemptions,
    ),
    ("ic:prompt_tokens", "tokens of prompts", lambda s: s.prompt_tokens),
    ("ic:generation_tokens", "tokens of answers", lambda s: s.generated_tokens),
    (
        "ic:prefix_cache_queries",
        "tokens of prompts that were looked for in the cache",
        lambda s: s.prompt_tokens,
    ),
    (
        "ic:prefix_cache_hits",
        "tokens of prompts that were found in the cache",
        lambda s: s.cached_tokens,
    ),
)


_LABELS = ("model_name", "engine")


class _OfTheEngine(Collector):
    """Reads the engine's own counts when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats], labels: tuple[str, str]) -> None:
        self._stats = stats
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, meaning, value in _GAUGES:
            gauge = GaugeMetricFamily(name, meaning, labels=_LABELS)
            gauge.add_metric(self._labels, value(stats))
            yield gauge
        for name, meaning, value in _COUNTERS:
            counter = CounterMetricFamily(name, meaning, labels=_LABELS)
            counter.add_metric(self._labels, value(stats))
            yield counter

    def describe(self) -> Iterator[Metric]:
        return iter(())  # the engine need not be asked before there are clients


class Metrics:
    """The counts of one server.

    Attributes:
        failures_in_a_row: how often the engine has failed since its last answer. The requests that
            one failure took along are not counted again.

    Args:
        stats: the engine's.
        model_name: what clients call the model.
    """

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self.failures_in_a_row = 0
        self._last_failure = 0.0
        registry = CollectorRegistry()
        self._labels = labels = (model_name, "0")
        registry.register(_OfTheEngine(stats, labels))
        self._registry = registry
        self._first = Histogram(
            "ic:time_to_first_token_seconds",
            "from the request's arrival in the engine to its first token",
            _LABELS,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        ).labels(*labels)
        self._between = Histogram(
            "ic:inter_token_latency_seconds",
            "between two tokens of an answer",
            _LABELS,
            buckets=_BETWEEN_TOKENS_S,
            registry=registry,
        ).labels(*labels)
        self._whole = Histogram(
            "ic:e2e_request_latency_seconds",
            "from the request's arrival in the engine to its last token",
            _LABELS,
            buckets=_WHOLE_S,
            registry=registry,
        ).labels(*labels)
        self._finished = Counter(
            "ic:request_success",
            "answers that ended, by reason: stop, length, abort or error",
            (*_LABELS, "finished_reason"),
            registry=registry,
        )
        self._responses = Counter(
            "ic:http_requests",
            "responses by route and HTTP status",
            (*_LABELS, "route", "status"),
            registry=registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(*labels, reason)

    def tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """Tokens of an answer came, so long after the one before, or after the request."""
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def finished(self, finish: Finish | None, began: float, now: float) -> None:
        """An answer ended; None where it was given up. Times are of `time.perf_counter`."""
        if finish is None or finish is Finish.CANCELLED:
            self._finished.labels(*self._labels, "abort").inc()
            return
        self._finished.labels(*self._labels, str(finish)).inc()
        self._whole.observe(now - began)
        if finish is not Finish.ERROR:
            self.failures_in_a_row = 0
        elif began > self._last_failure:
            self.failures_in_a_row += 1
            self._last_failure = now

    def response(self, route: str, status: int) -> None:
        self._responses.labels(*self._labels, route, status).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
