"""setup_docker.yml on a machine with systemd: an engine that runs a container, and Docker's own packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.lab import Lab
from tests.ansible.machines import Machine
from tests.ansible.vendor import Vendor, service

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

PLAYBOOK = "setup_docker.yml"
# The machines share the network of this host, whose bridges and tables are not theirs.
SETTINGS = {"bridge": "none", "iptables": False, "ip-forward": False, "storage-driver": "vfs"}


@pytest.fixture
def box(lab: Lab) -> Iterator[Machine]:
    yield lab.boot("box")
    lab.kill("box")


def inventory(lab: Lab, box: Machine, **variables: Any) -> Path:
    return lab.inventory({"docker_hosts": [box]}, docker_extra_settings=SETTINGS, **variables)


def test_the_distributions_engine_runs_a_container(lab: Lab, box: Machine) -> None:
    box.call("useradd", "alice")
    given = inventory(lab, box, docker_users=["alice"])
    assert lab.play(PLAYBOOK, given, "--check").changed("box") > 0
    assert box.call("sh", "-c", "command -v dockerd || true") == ""
    assert lab.play(PLAYBOOK, given).changed("box") > 0
    assert lab.play(PLAYBOOK, given).changed() == 0
    assert lab.play(PLAYBOOK, given, "--check").changed() == 0
    assert box.call("systemctl", "is-enabled", "docker") == "enabled"
    assert box.call("docker-compose", "version", "--short").startswith("1.29.")
    # An image of the machine's own files, with no registry: one static program.
    box.call(
        "sh",
        "-c",
        "apt-get install -qq busybox-static && tar -C / -c bin/busybox | docker import - box",
    )
    run = ("runuser", "-u", "alice", "--", "docker", "run", "--rm", "--network=none", "box")
    assert box.call(*run, "/bin/busybox", "echo", "from a container") == "from a container"
    info = json.loads(box.call("docker", "info", "--format", "{{json .}}"))
    assert info["LoggingDriver"] == "json-file"
    assert info["LiveRestoreEnabled"]
    # Drift: a setting edited, the daemon stopped.
    box.call("sed", "-i", "s/50m/5g/", "/etc/docker/daemon.json")
    box.call("systemctl", "stop", "docker.socket", "docker")
    assert lab.play(PLAYBOOK, given).changed("box") > 0
    assert json.loads(box.read("/etc/docker/daemon.json"))["log-opts"]["max-size"] == "50m"
    assert box.call("systemctl", "is-active", "docker") == "active"


def test_dockers_own_packages_come_by_their_key_and_series(
    lab: Lab, box: Machine, tmp_path: Path
) -> None:
    box.write("/usr/bin/nvidia-container-runtime", "#!/bin/sh\n")
    vendor = Vendor(tmp_path)
    daemon = {
        "/usr/bin/docker": "#!/bin/sh\necho 28.5.1\n",
        "/usr/lib/systemd/system/docker.service": service("/usr/bin/sleep infinity"),
    }
    vendor.add("docker-ce", "5:28.5.1-1~debian.12~bookworm", daemon)
    vendor.add("docker-ce", "5:29.0.0-1~debian.12~bookworm", daemon)
    vendor.add("docker-ce-cli", "5:28.5.1-1~debian.12~bookworm")
    vendor.add("containerd.io", "1.7.28-1~debian.12~bookworm")
    vendor.add("docker-buildx-plugin", "0.29.1-1~debian.12~bookworm")
    vendor.add("docker-compose-plugin", "2.40.0-1~debian.12~bookworm")
    vendor.publish()
    with vendor.served():
        given = inventory(
            lab,
            box,
            docker_from="docker",
            docker_repository=vendor.url,
            docker_repository_suite="/",
            docker_repository_components="",
            docker_repository_key_url=vendor.key_url,
            docker_repository_key_fingerprint=vendor.fingerprint,
        )
        wrong = json.dumps({"docker_repository_key_fingerprint": "0" * 40})
        refused = lab.play(PLAYBOOK, given, "-e", wrong)
        assert refused.code == 2
        assert f"and not {'0' * 40}" in " ".join(refused.output.split())
        assert lab.play(PLAYBOOK, given, "--check").changed("box") > 0
        assert lab.play(PLAYBOOK, given).changed("box") > 0
        assert lab.play(PLAYBOOK, given).changed() == 0
    version = ("dpkg-query", "-W", "-f", "${Version}", "docker-ce")
    assert box.call(*version) == "5:28.5.1-1~debian.12~bookworm"
    settings = json.loads(box.read("/etc/docker/daemon.json"))
    assert settings["runtimes"] == {"nvidia": {"path": "nvidia-container-runtime"}}
    other = lab.play(PLAYBOOK, given, "-e", '{"docker_from": "podman"}')
    assert "value of docker_from must be one of: distribution, docker" in other.output
