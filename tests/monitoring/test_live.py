"""A real run and a real server, below a real Prometheus: its queries answered, its alerts delivered."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from tests.monitoring.files import ALERTS, DASHBOARDS, Query, queries
from tests.monitoring.stack import Stack, answering, fit, router, stack, until
from tests.serving.served import Served, save_model, served

pytestmark = pytest.mark.monitoring
RUN = 'experiment="healthy", run_id="two"'


@pytest.fixture(scope="module")
def live(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("stack")) as found:
        yield found


@contextmanager
def asked(server: Served) -> Iterator[None]:
    """Requests one after the other, good ones and bad ones."""
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.1):
            server.complete(max_tokens=8, ignore_eos=True)
            server.complete(temperature=9)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def run(live: Stack) -> Iterator[Any]:
    """Two ranks of one run, seen over HTTP and by way of the textfile."""
    with fit(
        live,
        *("name=healthy", "run_id=two", "trainer.devices=2", "strategy=ddp"),
        *(
            f"callbacks.prometheus.textfile={live.textfiles}",
            "callbacks.checkpoint.every_n_steps=5",
        ),
        "callbacks.prometheus.textfile_every_s=1",
    ) as process:
        live.wait_for(f"ic_train_mfu_ratio{{{RUN}}}")
        live.wait_for(f"ic_train_checkpoint_timestamp_seconds{{{RUN}}}")
        yield process


def test_two_ranks_of_one_host_answer_each_for_itself(live: Stack, run: Any) -> None:
    steps = live.wait_for(f'ic_train_step{{{RUN}, job="training"}}', 2)
    assert {labels["rank"] for labels, _ in steps} == {"0", "1"}
    assert len({labels["instance"] for labels, _ in steps}) == 2
    about = live.wait_for(f'ic_train_info{{{RUN}, job="training"}}', 2)
    assert {labels["node"] for labels, _ in about} == {socket.gethostname()}
    assert {labels["local_rank"] for labels, _ in about} == {"0", "1"}
    assert {labels["world_size"] for labels, _ in about} == {"2"}
    # What is the whole run's is told once.
    for name in ("tokens_total", "loss", "mfu_ratio", "rollbacks_total", "requeues_total"):
        [(labels, value)] = live.wait_for(f'ic_train_{name}{{{RUN}, job="training"}}')
        assert labels["rank"] == "0"
        assert math.isfinite(value)
    # Steps are the run's, tokens those of both ranks: 256 each.
    rate = live.wait_for(
        f'ic_train_tokens_total{{{RUN}, job="training"}} / on () max(ic_train_step{{{RUN}}})'
    )
    assert rate[0][1] == pytest.approx(512, rel=0.3)  # scraped a moment apart


def test_node_exporter_tells_what_the_textfile_holds(live: Stack, run: Any) -> None:
    found = live.wait_for(f'ic_train_loss{{{RUN}, job="node"}}')
    assert found[0][0]["rank"] == "0"
    assert len(live.wait_for(f'ic_train_gpu_memory_bytes{{{RUN}, job="node"}}', 2)) == 2
    assert live.wait_for('node_textfile_scrape_error{job="node"}')[0][1] == 0


VARIABLES = {"$experiment": ".*", "$run_id": ".*", "$model_name": ".*", "$instance": ".*"}


def replaced(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    expr = expr.replace("$__rate_interval", "1m")
    assert "$" not in expr, expr
    return expr


def answer(live: Stack, query: Query) -> list[dict[str, Any]]:
    """Series with a number among their values, as the panel asks for them."""
    expr, now = replaced(query.expr), time.time()
    if query.instant:
        found = live.ask("query", query=expr)["result"]
        series = [(each["metric"], [each["value"]]) for each in found]
    else:
        found = live.ask("query_range", query=expr, start=now - 10, end=now, step=1)["result"]
        series = [(each["metric"], each["values"]) for each in found]
    return [labels for labels, values in series if any(math.isfinite(float(v)) for _, v in values)]


def test_every_query_of_every_dashboard_finds_data(live: Stack, run: Any, tmp_path: Path) -> None:
    sample = Path(__file__).with_name("dcgm.prom").read_bytes()
    with (
        served(save_model(tmp_path / "tiny"), cache_tokens=4096) as server,
        router(live, server.url) as split,
        asked(Served(split, None)),
        answering(lambda request: (200, sample)) as dcgm,
    ):
        for url in (server.url, split):
            live.add_target("serving", int(url.rpartition(":")[2]))
        live.add_target("gpu", dcgm)
        assert len(queries()) > 50
        for query in queries():
            name = f"{query.dashboard}, {query.panel}: {query.expr}"
            found = until(lambda query=query: answer(live, query), name)
            # No legend has a hole.
            for label in re.findall(r"{{(\w+)}}", query.legend):
                assert all(label in labels for labels in found), (name, label)

        for path in DASHBOARDS:
            for variable in json.loads(path.read_text())["templating"]["list"]:
                if variable["type"] != "query":
                    continue
                text = replaced(variable["query"]["query"])
                asks = re.fullmatch(r"label_values\((.+), (\w+)\)", text)
                assert asks, text
                choices = live.ask(f"label/{asks[2]}/values", **{"match[]": asks[1]})
                assert choices, text


def test_vllm_s_names_are_those_that_are_asked_for(live: Stack) -> None:
    """Its library answers in OpenMetrics, where a colon becomes an underscore."""
    registry = CollectorRegistry()
    waiting = Gauge(
        "vllm:num_requests_waiting", "as vLLM", ["model_name", "engine"], registry=registry
    )
    for engine, count in (("0", 3), ("1", 4)):  # two data-parallel ranks behind one address
        waiting.labels("ours", engine).set(count)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    live.add_target("serving", server.server_port)
    found = live.wait_for('{__name__=~"(ic|vllm):num_requests_waiting", model_name="ours"}', 2)
    assert {labels["engine"]: value for labels, value in found} == {"0": 3, "1": 4}
    assert {labels["__name__"] for labels, _ in found} == {"vllm:num_requests_waiting"}
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_loss_without_a_number_reaches_the_webhook(live: Stack) -> None:
    with fit(
        live,
        *("name=broken", "run_id=nan", "optimizer.lr=1e30", "optimizer.warmup_steps=0"),
        *("callbacks.guardrails=null", "trainer.gradient_clip_val=null"),
        "callbacks.checkpoint.every_n_steps=1000000",
    ):
        live.wait_for('ic_train_loss{experiment="broken"} != ic_train_loss{experiment="broken"}')

        def arrived() -> list[dict[str, Any]]:
            return [a for a in live.webhook.alerts if a["labels"].get("experiment") == "broken"]

        [alert] = until(arrived, "the alert at the webhook")
    expected = ALERTS["TrainingLossNotFinite"]
    assert alert["status"] == "firing"
    assert alert["labels"] == {
        "alertname": "TrainingLossNotFinite", "severity": "page", "experiment": "broken",
        "run_id": "nan",
    }  # fmt: skip
    summary = "broken/nan has a loss that is no number, or bad steps in a row"
    assert alert["annotations"] == {**expected["annotations"], "summary": summary}
    assert live.webhook.refused == 0


def test_a_run_that_is_stopped_takes_its_files_away(live: Stack, run: Any) -> None:
    """Last: it ends the run."""
    names = ["healthy_two_rank0.json", "healthy_two_rank1.json"]
    assert sorted(p.name for p in (live.targets / "training").glob("healthy*")) == names
    assert len(list(live.textfiles.glob("*.prom"))) == 2
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    assert list((live.targets / "training").glob("healthy*")) == []
    assert list(live.textfiles.glob("*.prom")) == []
    # Prometheus forgets the target, and does not take the run for one that is down.
    until(lambda: not live.values('up{job="training", experiment="healthy"}'), "a target less")
