"""What ansible/setup_monitoring.yml sets up: exporter, Prometheus, Alertmanager."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ic.doctor.ask import exporter, get, not_here, stopped, unit
from ic.doctor.check import Finding

PLAYBOOK = "setup_monitoring.yml"
DEFAULTS = Path("/etc/default")


def monitoring() -> Iterator[Finding]:
    """The node exporter; Prometheus with its rules and targets, and Alertmanager where they run."""
    name = "prometheus-node-exporter"
    address = listens(DEFAULTS / name, "127.0.0.1:9100")
    yield exporter("node exporter", name, f"http://{address}/metrics", "node_load1", PLAYBOOK)
    state = unit("prometheus")
    if state is None:
        yield not_here("Prometheus", PLAYBOOK)
    elif finding := stopped("Prometheus", "prometheus", state, PLAYBOOK):
        yield finding
    else:
        yield from prometheus(f"http://{listens(DEFAULTS / 'prometheus', '127.0.0.1:9090')}")
    name = "prometheus-alertmanager"
    address = listens(DEFAULTS / name, "127.0.0.1:9093")
    url, metric = f"http://{address}/metrics", "alertmanager_alerts"
    yield exporter("Alertmanager", name, url, metric, PLAYBOOK)


def listens(options: Path, otherwise: str) -> str:
    """The address in the options of a Debian package's service, as this machine reaches it."""
    text = options.read_text() if options.is_file() else ""
    given = re.search(r"--web\.listen-address=[\"']?([^\s\"']+)", text)
    address = given[1] if given else otherwise
    return re.sub(r"^(0\.0\.0\.0|\[::\])?:", "127.0.0.1:", address)


def prometheus(url: str) -> Iterator[Finding]:
    """Rules that it follows, and targets that do not answer it."""
    try:
        rules = json.loads(get(f"{url}/api/v1/rules"))["data"]["groups"]
        targets = json.loads(get(f"{url}/api/v1/targets?state=active"))["data"]["activeTargets"]
    except (OSError, ValueError) as error:
        yield Finding(
            "Prometheus",
            "fail",
            f"{url} does not answer: {error}",
            f"journalctl -u prometheus says why; ansible/{PLAYBOOK} sets its address",
        )
        return
    count = sum(len(group["rules"]) for group in rules)
    if count:
        yield Finding("Prometheus", "ok", f"answers at {url}, {count} rules")
    else:
        fix = f"ansible/{PLAYBOOK} brings those of deploy/monitoring"
        yield Finding("Prometheus", "warn", f"answers at {url}, but follows no rules", fix)
    down = [target for target in targets if target["health"] == "down"]
    if down:
        first = down[0]
        name = f"{first['labels'].get('job')} {first['labels'].get('instance')}"
        yield Finding(
            "Prometheus's targets",
            "warn",
            f"{len(down)} of {len(targets)} are down; {name}: {first['lastError']}",
            f"run doctor there; ansible/{PLAYBOOK} sets the addresses of all machines",
        )
    else:
        yield Finding("Prometheus's targets", "ok", f"none of {len(targets)} is down")
