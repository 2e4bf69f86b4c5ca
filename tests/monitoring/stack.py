"""Prometheus, Alertmanager, node_exporter and a webhook, started with the files of deploy/monitoring.

What differs from the files as they are shipped: addresses and folders, since ports are those that are
free, and intervals, which are seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import yaml

from tests.ansible.machines import free_ports
from tests.monitoring.files import MONITORING, ROOT, load

PASSWORD = "of-the-webhook"
# Long enough for a machine with other things to do; what is waited for comes within seconds.
PATIENCE_S = 240
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the context, with all that it has started; and with this process."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdout=output,
            stderr=output,
            start_new_session=True,
            **options,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[int]:
    """A server of this process, by its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Webhook:
    """What Alertmanager has sent to whoever knows the password."""

    alerts: list[dict[str, Any]] = field(default_factory=list)
    refused: int = 0

    def take(self, request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        body = request.rfile.read(int(request.headers["content-length"]))
        if request.headers["authorization"] != f"Bearer {PASSWORD}":
            self.refused += 1
            return 401, b""
        self.alerts += json.loads(body)["alerts"]
        return 200, b""


@dataclass
class Stack:
    """The programs, while they run."""

    folder: Path
    url: str
    webhook: Webhook

    def __post_init__(self) -> None:
        self.http = httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def targets(self) -> Path:
        return self.folder / "targets"

    @property
    def textfiles(self) -> Path:
        return self.folder / "textfiles"

    def ask(self, route: str, **parameters: Any) -> Any:
        answer = self.http.get(f"/api/v1/{route}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample now."""
        found = self.ask("query", query=query)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def add_target(self, job: str, port: int) -> None:
        path = self.targets / job / f"{port}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"]}]))
        temporary.replace(path)

    def wait_for(self, query: str, count: int = 1) -> list[tuple[dict[str, str], float]]:
        """What a query finds, once it finds so many; a scrape may fail on a busy machine."""

        def found() -> list[tuple[dict[str, str], float]] | None:
            values = self.values(query)
            return values if len(values) >= count else None

        return until(found, query)


def until(look: Callable[[], Any], what: str) -> Any:
    """What is found, once it is something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.2)
    return found


@contextmanager
def stack(folder: Path) -> Iterator[Stack]:
    """Start all of it."""
    webhook = Webhook()
    with ExitStack() as started:
        webhook_port = started.enter_context(answering(webhook.take))
        names = ("prometheus", "alertmanager", "node")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        for job in ("training", "serving", "node", "gpu"):
            (folder / "targets" / job).mkdir(parents=True)
        (folder / "textfiles").mkdir()
        (folder / "token").write_text(PASSWORD)

        settings = load(MONITORING / "prometheus.yml")
        settings["global"] = dict.fromkeys(settings["global"], "2s")
        settings["rule_files"] = [str(MONITORING / each) for each in settings["rule_files"]]
        [alertmanagers] = settings["alerting"]["alertmanagers"]
        alertmanagers["static_configs"][0]["targets"] = [f"127.0.0.1:{ports['alertmanager']}"]
        own = settings["scrape_configs"][-1]
        assert own["job_name"] == "prometheus"
        own["static_configs"][0]["targets"] = [f"127.0.0.1:{ports['prometheus']}"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))

        told = load(MONITORING / "alertmanager.yml")
        for route in (told["route"], *told["route"]["routes"]):
            route.update(group_wait="1s")
        [receiver] = told["receivers"][0]["webhook_configs"]
        receiver["url"] = f"http://127.0.0.1:{webhook_port}/alerts"
        receiver["http_config"]["authorization"]["credentials_file"] = str(folder / "token")
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(told))

        for name, command in {
            "prometheus": ["prometheus", f"--config.file={folder}/prometheus.yml",
                           f"--storage.tsdb.path={folder}/tsdb",
                           f"--web.listen-address=127.0.0.1:{ports['prometheus']}"],
            "alertmanager": ["prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml",
                             f"--storage.path={folder}/alertmanager", "--cluster.listen-address=",
                             f"--web.listen-address=127.0.0.1:{ports['alertmanager']}"],
            "node": ["prometheus-node-exporter", f"--web.listen-address=127.0.0.1:{ports['node']}",
                     f"--collector.textfile.directory={folder}/textfiles"],
        }.items():  # fmt: skip
            started.enter_context(running(command, folder / f"{name}.log"))
        found = Stack(folder, f"http://127.0.0.1:{ports['prometheus']}", webhook)
        until(lambda: answers(f"{found.url}/-/ready"), (folder / "prometheus.log").read_text())
        found.add_target("node", ports["node"])
        yield found


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def fit(stack: Stack, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real run that goes on until it is stopped, seen by Prometheus."""
    command = [
        *(sys.executable, "-m", "ic", "fit", "experiment=mla_tiny", "debug=default"),
        *("callbacks=prometheus", f"callbacks.prometheus.targets={stack.targets}/training"),
        *("callbacks.throughput.peak_bf16_flops=1e11", "callbacks.throughput.warmup_steps=0"),
        *("callbacks.context_length=null", "callbacks.passkey=null"),
        *("data.context_length=128", "data.tokens_per_batch=256", "data.val_batches=1"),
        *("data.num_workers=0", "trainer.max_steps=1000000", "trainer.val_check_interval=1000000"),
        *overrides,
    ]
    log = stack.folder / f"fit-{len(list(stack.folder.glob('fit-*')))}.log"
    with running(command, log, cwd=stack.folder, env=ENVIRONMENT) as process:
        yield process


@contextmanager
def router(stack: Stack, server: str) -> Iterator[str]:
    """A router in front of a server, which is both versions by two names, by its address."""
    other = server.replace("127.0.0.1", "localhost")
    versions = f"{{stable:{{urls:[{server}],weight:60}},canary:{{urls:[{other}],weight:40}}}}"
    command = [
        *(sys.executable, "-m", "ic", "ab", "route", f"versions={versions}", "port=0"),
        f"output={stack.folder}/ab",
    ]
    log = stack.folder / "router.log"
    with running(command, log, cwd=stack.folder, env=ENVIRONMENT):
        found = until(lambda: re.search(r"http://127.0.0.1:\d+", log.read_text()), "the router")
        yield found[0]
