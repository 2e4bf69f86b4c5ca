"""The scalers' queries, asked of a real Prometheus that reads pods of several data-parallel ranks."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import MetricsHandler

from tests.ansible.machines import free_ports
from tests.deploy.charts import Document, documents, of_kind, one

pytestmark = pytest.mark.chart
# (release, version, pod, rank): running, waiting, share of the KV cache. What is not of the release
# demo and the version stable must not be counted.
LOAD = {
    ("demo", "stable", "pod-a", 0): (20, 10, 0.9),
    ("demo", "stable", "pod-a", 1): (20, 0, 0.5),
    ("demo", "stable", "pod-b", 0): (25, 5, 1.0),
    ("demo", "stable", "pod-b", 1): (15, 5, 0.8),
    ("demo", "canary", "pod-c", 0): (500, 500, 1.0),
    ("other", "stable", "pod-d", 0): (500, 500, 1.0),
}
REQUESTS = 20 + 10 + 20 + 25 + 5 + 15 + 5
CACHES = (0.9 + 0.5) / 2 + (1.0 + 0.8) / 2
MOST_TRIES = 2400
NAMES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class PlainText(MetricsHandler):
    """As our engine, which writes one format whatever is asked for."""

    def do_GET(self) -> None:  # noqa: N802
        del self.headers["Accept"]
        super().do_GET()


@contextmanager
def exporter(ranks: dict[int, tuple[float, ...]], prefix: str) -> Iterator[int]:
    """A pod's /metrics as vLLM or our engine writes it -> its port."""
    registry = CollectorRegistry()
    for position, name in enumerate(NAMES):
        gauge = Gauge(f"{prefix}:{name}", "of a rank", ("model_name", "engine"), registry=registry)
        for rank, values in ranks.items():
            gauge.labels("mla", str(rank if prefix == "vllm" else 0)).set(values[position])
    handler = (MetricsHandler if prefix == "vllm" else PlainText).factory(registry)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Prometheus:
    """Asks a running one."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> Any:
        with self.opener.open(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def query(self, text: str) -> list[Any]:
        """Samples, as KEDA's scaler would get them."""
        return self.get(f"/api/v1/query?query={urllib.parse.quote(text)}")["data"]["result"]

    def number(self, text: str) -> float:
        (sample,) = self.query(text)
        return float(sample["value"][1])

    def recorded(self, text: str, expected: float) -> float:
        """What a rule records, once it was evaluated after all pods were read: before, a part."""
        for _ in range(MOST_TRIES):
            if (number := self.number(text)) == pytest.approx(expected):
                break
            time.sleep(0.05)
        return number

    def until(self, process: subprocess.Popen[bytes], true: Callable[[], bool]) -> None:
        """Wait for Prometheus to have read what it is to answer from, which takes it a second."""
        for _ in range(MOST_TRIES):
            assert process.poll() is None, "Prometheus has ended"
            try:
                if true():
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"Prometheus has not read the pods: {self.query('up')}")


@contextmanager
def prometheus(
    folder: Path, targets: dict[tuple[str, str, str], int], rules: list[Document]
) -> Iterator[Prometheus]:
    """Reads pods with the labels that the ServiceMonitor and Prometheus's operator give them.

    Every pod is read twice, as where two monitors select it.
    """
    if shutil.which("prometheus") is None:
        pytest.skip("no Prometheus: make chart installs Debian's, as root")
    (endpoint,) = one(documents("data-parallel"), "ServiceMonitor")["spec"]["endpoints"]
    spelled = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    renamed = [
        {spelled.get(key, key): value for key, value in each.items()}
        for each in endpoint["metricRelabelings"]
    ]
    jobs = [
        {
            "job_name": f"{release}-{version}-{pod}-{scrape}",
            "metric_relabel_configs": renamed,
            "static_configs": [
                {
                    "targets": [f"127.0.0.1:{port}"],
                    "labels": {
                        "namespace": "models",
                        "release": release,
                        "version": version,
                        "pod": pod,
                    },
                }
            ],
        }
        for (release, version, pod), port in targets.items()
        for scrape in ("once", "twice")
    ]
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": rules}))
    often = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    config = {"global": often, "rule_files": ["rules.yml"], "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = Prometheus(port)
    try:
        series = '{__name__=~".*:kv_cache_usage_perc"}'
        count = 2 * len(LOAD)
        found.until(process, lambda: len(found.query(series)) == count)
        found.until(
            process,
            lambda: all(
                rule["health"] == "ok" and found.query(rule["name"])
                for group in found.get("/api/v1/rules")["data"]["groups"]
                for rule in group["rules"]
            ),
        )
        yield found
    finally:
        process.kill()
        process.wait()


@contextmanager
def watched(folder: Path, prefix: str, rules: list[Document]) -> Iterator[Prometheus]:
    """Of the load above: vLLM's ranks share a pod's port, our engine has one rank for each pod."""
    with ExitStack() as stack:
        targets: dict[tuple[str, str, str], int] = {}
        ranks: dict[tuple[str, str, str], dict[int, tuple[float, ...]]] = {}
        for (release, version, pod, rank), values in LOAD.items():
            name = pod if prefix == "vllm" else f"{pod}-{rank}"
            ranks.setdefault((release, version, name), {})[rank] = values
        for key, values_of in ranks.items():
            targets[key] = stack.enter_context(exporter(values_of, prefix))
        yield stack.enter_context(prometheus(folder, targets, rules))


def replicas(trigger: Document, value: float) -> int:
    """What the HorizontalPodAutoscaler makes of a trigger's AverageValue."""
    assert trigger["metricType"] == "AverageValue"
    return math.ceil(value / float(trigger["metadata"]["threshold"]))


def test_keda_counts_every_rank_once(tmp_path: Path) -> None:
    scaled = one(documents("data-parallel"), "ScaledObject")
    triggers = {each["name"]: each for each in scaled["spec"]["triggers"]}
    with watched(tmp_path, "vllm", []) as found:
        requests = found.number(triggers["requests"]["metadata"]["query"])
        caches = found.number(triggers["cache"]["metadata"]["query"])
        assert requests == REQUESTS == 100
        assert caches == pytest.approx(CACHES)
        # 100 requests at 32 for each replica; caches of two pods as full as those of 1.6.
        assert replicas(triggers["requests"], requests) == 4
        assert replicas(triggers["cache"], caches) == 2
        # What others ask: the sum over two scrapes, and the rank 0 alone.
        series = 'vllm:num_requests_running{release="demo",version="stable"}'
        assert found.number(f"sum({series})") == 2 * 80
        assert found.number(f'sum({series[:-1]},engine="0"}})') == 2 * 45
        # Where no series matches there is none, which KEDA takes for an error (ignoreNullValues).
        nobody = triggers["requests"]["metadata"]["query"].replace('"stable"', '"nobody"')
        assert found.query(nobody) == []
    assert triggers["requests"]["metadata"]["ignoreNullValues"] == "false"


def test_the_autoscaler_reads_what_the_rules_record(tmp_path: Path) -> None:
    """Of our own engine, which has one rank for each pod."""
    found = documents("cpu-engine")
    groups = one(found, "PrometheusRule")["spec"]["groups"]
    groups[0]["interval"] = "1s"
    metrics = one(found, "HorizontalPodAutoscaler")["spec"]["metrics"]
    with watched(tmp_path, "ic", groups) as asked:
        for metric, value in zip(metrics, (REQUESTS, 0.9 + 0.5 + 1.0 + 0.8), strict=True):
            wanted = metric["external"]["metric"]
            labels = wanted["selector"]["matchLabels"]
            chosen = ",".join(f'{key}="{each}"' for key, each in labels.items())
            name = f"{wanted['name']}{{{chosen}}}"
            assert asked.recorded(name, value) == pytest.approx(value)
    averages = [each["external"]["target"]["averageValue"] for each in metrics]
    assert averages == ["8", "800m"]


def test_the_monitor_gives_the_labels_that_are_asked_for() -> None:
    found = documents("data-parallel")
    (endpoint,) = one(found, "ServiceMonitor")["spec"]["endpoints"]
    given = {
        each["targetLabel"]: each["sourceLabels"][0].removeprefix("__meta_kubernetes_pod_label_")
        for each in endpoint["relabelings"]
    }
    labels = one(found, "Deployment")["spec"]["template"]["metadata"]["labels"]
    # Prometheus writes each character of a label that it does not allow as an underscore.
    known = {
        "".join(c if c.isalnum() else "_" for c in key): value for key, value in labels.items()
    }
    assert {name: known[label] for name, label in given.items()} == {
        "release": "demo",
        "version": "stable",
    }
    assert endpoint["authorization"]["credentials"] == {"name": "ic-token", "key": "token"}
    service = one(found, "Service")
    assert service["spec"]["selector"].items() <= labels.items()
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_scale_to_zero_is_woken_by_what_holds_the_request() -> None:
    found = documents("scale-to-zero")
    scaled, route = one(found, "ScaledObject")["spec"], one(found, "InterceptorRoute")
    assert (scaled["minReplicaCount"], "fallback" in scaled) == (0, False)
    wake = next(each for each in scaled["triggers"] if each["type"] == "external-push")
    assert wake["metadata"]["interceptorRoute"] == route["metadata"]["name"]
    # The route leads to the interceptor, which finds the service by what the route says.
    (rule,) = one(found, "HTTPRoute")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["name"], backend["namespace"]) == (
        "keda-add-ons-http-interceptor-proxy",
        "keda",
    )
    (said,) = backend["filters"][0]["requestHeaderModifier"]["set"]
    (known,) = route["spec"]["rules"]
    assert known["headers"] == [said]
    assert known["hosts"] == one(found, "HTTPRoute")["spec"]["hostnames"]
    assert route["spec"]["target"] == {
        "service": one(found, "Service")["metadata"]["name"],
        "port": 8000,
    }
    grant = one(found, "ReferenceGrant")
    assert grant["metadata"]["namespace"] == backend["namespace"]
    assert grant["spec"]["to"] == [{"group": "", "kind": "Service", "name": backend["name"]}]
    allowed = one(found, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}
    } in allowed


def test_scale_to_zero_by_a_query() -> None:
    query = 'sum(increase(ic_router_requests_total{version="stable"}[2m]))'
    settings = f"defaults.autoscaling.wake={json.dumps({'by': 'query', 'query': query})}"
    found = documents("scale-to-zero", settings)
    assert not of_kind(found, "InterceptorRoute")
    wake = one(found, "ScaledObject")["spec"]["triggers"][-1]
    assert wake["metadata"]["query"] == query
    assert wake["metadata"]["activationThreshold"] == "0"
    (rule,) = one(found, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [
        {"name": "demo-infinite-context-stable", "port": 8000, "weight": 100}
    ]
