"""The monitoring playbook on two machines: Debian's Prometheus, Alertmanager and node exporters."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.examined import examined, shared_python
from tests.ansible.lab import Lab
from tests.ansible.machines import Machine, free_ports
from tests.ansible.test_refusals import refused
from tests.ansible.vendor import Vendor

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
PLAYBOOK = "setup_monitoring.yml"
RULES = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "rules"
# Grafana's package stands for the real one: it answers where it is told to.
GRAFANA = """#!/usr/bin/python3
import http.server, os
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["PROMETHEUS_URL"].encode())
open(os.environ["GF_SECURITY_ADMIN_PASSWORD__FILE"]).read()
address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(address, Health).serve_forever()
"""


def ask(address: str, path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}{path}", timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(autouse=True)
def machines_end(lab: Lab) -> Iterator[None]:
    yield
    lab.stop()


class Webhook:
    """Receives what Alertmanager sends."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.arrived = threading.Event()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                webhook.received.append((self.headers["Authorization"], body))
                self.send_response(200)
                self.end_headers()
                webhook.arrived.set()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    webhook = Webhook()
    yield webhook
    webhook.server.shutdown()
    webhook.server.server_close()


def test_two_machines(lab: Lab, webhook: Webhook, tmp_path: Path) -> None:
    vendor = Vendor(tmp_path)
    unit = (
        "[Service]\nExecStart=/usr/sbin/grafana-server\nUser=grafana\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )
    vendor.add(
        "grafana",
        "13.2.3",
        {
            "/usr/sbin/grafana-server": GRAFANA,
            "/lib/systemd/system/grafana-server.service": unit,
            "/etc/grafana/provisioning/datasources/sample.yaml": "",
            "/etc/grafana/provisioning/dashboards/sample.yaml": "",
        },
        script="useradd --system grafana",
    )
    vendor.publish()
    lab.boot("watch", "node", shared=shared_python())
    watch, node = lab.machines["watch"], lab.machines["node"]
    ports = dict(zip(("prometheus", "alertmanager", "grafana"), free_ports(3), strict=True))
    listen = {name: f"{watch.address}:{port}" for name, port in ports.items()}
    with vendor.served():
        inventory = lab.inventory(
            {"monitoring": [watch], "gpu_nodes": [node]},
            secrets={
                "vault_monitoring_webhook_token": "a token for the webhook",
                "vault_monitoring_grafana_password": "a password of Grafana",
            },
            monitoring_exporter_address="{{ ansible_host }}",
            monitoring_exporter_port=free_ports(1)[0],
            nvidia_dcgm_exporter_listen="{{ ansible_host }}:9400",
            monitoring_prometheus_listen=listen["prometheus"],
            monitoring_alertmanager_listen=listen["alertmanager"],
            monitoring_webhook_url=webhook.url,
            monitoring_grafana_listen=listen["grafana"],
            monitoring_grafana_repository=vendor.url,
            monitoring_grafana_repository_key=vendor.key_url,
            monitoring_grafana_repository_fingerprint=vendor.fingerprint,
        )
        assert lab.play(PLAYBOOK, inventory, "--check").changed("watch", "node") > 0
        assert watch.call("sh", "-c", "dpkg-query -W prometheus || true") == ""
        assert lab.play(PLAYBOOK, inventory).changed("watch", "node") > 0
        assert lab.play(PLAYBOOK, inventory).changed() == 0
        assert lab.play(PLAYBOOK, inventory, "--check").changed() == 0

        check_services(watch, listen)
        check_alert(watch, node, listen, webhook)
        check_doctor(watch, node)

        watch.call("sh", "-c", "echo '# drift' >> /etc/prometheus/prometheus.yml")
        watch.write("/etc/prometheus/rules/infinite-context-of_old.yml", "groups: []")
        node.call("systemctl", "stop", "prometheus-node-exporter")
        play = lab.play(PLAYBOOK, inventory)
        assert (play.changed("watch"), play.changed("node")) == (3, 1)
        assert node.call("systemctl", "is-active", "prometheus-node-exporter") == "active"
        assert "of_old" not in watch.call("ls", "/etc/prometheus/rules")


def check_services(watch: Machine, listen: dict[str, str]) -> None:
    """Our rules are followed, the inventory's machines are targets, Grafana knows Prometheus."""
    groups = ask(listen["prometheus"], "/api/v1/rules")["data"]["groups"]
    alerts = {rule["name"] for group in groups for rule in group["rules"]}
    assert {group["name"] for group in groups} == {path.stem for path in RULES.glob("*.yml")}
    assert {"NodeDown", "TrainingStalled"} <= alerts
    targets = ask(listen["prometheus"], "/api/v1/targets?state=active")["data"]["activeTargets"]
    assert {(t["labels"]["job"], t["labels"]["instance"]) for t in targets} == {
        ("node", "watch"),
        ("node", "node"),
        ("gpu", "node"),
        ("prometheus", listen["prometheus"]),
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{listen['grafana']}/api/health") as answer:
        assert answer.read().decode() == f"http://{listen['prometheus']}"
    assert watch.call("stat", "-c", "%a %G", "/etc/grafana/admin_password") == "640 grafana"
    assert watch.call("stat", "-c", "%a %U", "/etc/prometheus/webhook_token") == "400 prometheus"
    assert "training.json" in watch.call("ls", "/var/lib/grafana/dashboards")


def check_alert(watch: Machine, node: Machine, listen: dict[str, str], webhook: Webhook) -> None:
    """A rule of the machine's own fires; the webhook gets it with the token from the vault."""
    rule = "groups: [{name: own, rules: [{alert: Own, expr: vector(1), labels: {severity: page}}]}]"
    watch.write("/etc/prometheus/rules/own.yml", rule)
    watch.call("systemctl", "reload", "prometheus")
    assert webhook.arrived.wait(timeout=300), watch.call("journalctl", "-n", "30", "--no-pager")
    authorization, body = webhook.received[0]
    assert authorization == "Bearer a token for the webhook"
    assert [alert["labels"]["alertname"] for alert in body["alerts"]] == ["Own"]
    watch.call("rm", "/etc/prometheus/rules/own.yml")
    watch.call("systemctl", "reload", "prometheus")


def check_doctor(watch: Machine, node: Machine) -> None:
    found = examined(watch, "monitoring.monitoring")
    for what in ("node exporter", "Prometheus", "Alertmanager"):
        assert found[what]["status"] == "ok", found[what]
    # No DCGM exporter answers at the machine that the inventory says has GPUs.
    assert found["Prometheus's targets"]["status"] == "warn"
    assert "1 of 4 are down; gpu node: " in found["Prometheus's targets"]["found"]
    found = examined(node, "monitoring.monitoring")
    assert found["node exporter"]["status"] == "ok"
    assert found["Prometheus"]["found"].startswith("not set up here")

    node.call("systemctl", "stop", "prometheus-node-exporter")
    watch.call("systemctl", "stop", "prometheus")
    found = examined(node, "monitoring.monitoring")["node exporter"]
    assert (found["status"], found["found"]) == (
        "fail",
        "prometheus-node-exporter is inactive (dead)",
    )
    assert "ansible/setup_monitoring.yml starts it" in found["fix"]
    assert (
        examined(watch, "monitoring.monitoring")["Prometheus"]["found"]
        == "prometheus is inactive (dead)"
    )
    watch.call("systemctl", "start", "prometheus")
    node.call("systemctl", "start", "prometheus-node-exporter")
    node.call(
        "sh",
        "-c",
        "sed -i 's/listen-address=/&127.0.0.1:1 --web.disable-x=/' /etc/default/prometheus-node-exporter",
    )
    found = examined(node, "monitoring.monitoring")["node exporter"]
    assert found["found"].startswith(
        "prometheus-node-exporter runs, but http://127.0.0.1:1/metrics"
    )
    node.call(
        "sh",
        "-c",
        "sed -i 's/127.0.0.1:1 --web.disable-x=//' /etc/default/prometheus-node-exporter",
    )


def test_exporter_that_prometheus_cannot_reach(lab: Lab) -> None:
    lab.boot("watch", "node")
    inventory = lab.inventory(
        {"monitoring": [lab.machines["watch"]], "gpu_nodes": [lab.machines["node"]]},
        monitoring_grafana=False,
    )
    said = refused(lab.play(PLAYBOOK, inventory))
    assert said.startswith(
        "The node exporter of node would listen on 127.0.0.1, where Prometheus on watch cannot "
        "reach it."
    )
    assert 'for example to "{{ ansible_host }}"' in said
    both = [lab.machines["watch"], lab.machines["node"]]
    said = refused(lab.play(PLAYBOOK, lab.inventory({"monitoring": both})))
    assert said.startswith("The group monitoring has 2 machines (watch, node)")
