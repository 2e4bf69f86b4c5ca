"""site.yml runs the parts whose groups have machines, and leaves out the others."""

from __future__ import annotations

import pytest

from tests.ansible.lab import Lab
from tests.ansible.machines import free_ports

pytestmark = [pytest.mark.hosts, pytest.mark.slow]


def test_one_part_of_five(lab: Lab) -> None:
    machine = lab.boot("alone")
    address = machine.address
    exporter, prometheus, alertmanager = free_ports(3)
    inventory = lab.inventory(
        {"monitoring": [machine]},
        monitoring_grafana=False,
        monitoring_exporter_address=address,
        monitoring_exporter_port=exporter,
        monitoring_prometheus_listen=f"{address}:{prometheus}",
        monitoring_alertmanager_listen=f"{address}:{alertmanager}",
    )
    assert lab.play("site.yml", inventory).changed("alone") > 0
    assert machine.call("systemctl", "is-active", "prometheus") == "active"
    for program in ("docker", "k3s", "slurmctld", "nvidia-smi"):
        assert machine.call("sh", "-c", f"command -v {program} || true") == ""
    assert lab.play("site.yml", inventory).changed() == 0
    assert lab.play("site.yml", inventory, "--check").changed() == 0
    lab.kill("alone")
