"""The K3s playbook on machines, with a program that stands for K3s.

No registry has K3s's binary, and GitHub is not reached from everywhere. The stand-in takes the same
configuration, says to systemd that it is ready, lets in who has the token, and answers the few
questions that the role asks kubectl. What Kubernetes makes of our manifests is not tested here; they
are held against Kubernetes's schemas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ansible.examined import examined, shared_python
from tests.ansible.lab import Lab
from tests.ansible.machines import Machine
from tests.ansible.test_refusals import refused
from tests.ansible.vendor import Vendor

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
PLAYBOOK = "setup_k3s.yml"
TOKEN = "a token that servers and agents share"
K3S = """#!/usr/bin/python3
# {version}
import os, pathlib, signal, socket, sys
cluster = pathlib.Path("{cluster}")
arguments = " ".join(sys.argv[1:])
if sys.argv[1] in ("server", "agent"):
    text = pathlib.Path("/etc/rancher/k3s/config.yaml").read_text()
    config = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    token = pathlib.Path(config["token-file"]).read_text()
    if "server" not in config:
        (cluster / "token").write_text(token)
    elif (cluster / "token").read_text() != token:
        sys.exit("token is not that of the cluster")
    (cluster / "nodes" / config["node-name"]).touch()
    if sys.argv[1] == "server":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    signal.pause()
elif arguments.startswith("kubectl get nodes"):
    print(*(path.name + "=True" for path in (cluster / "nodes").iterdir()))
elif arguments == "kubectl get --raw /readyz":
    print("ok")
elif arguments == "kubectl get runtimeclass nvidia --output=name":
    print("runtimeclass.node.k8s.io/nvidia")
elif arguments.startswith("kubectl delete"):
    with open("/root/deleted", "a") as log:
        log.write(sys.argv[-1] + chr(10))
else:
    sys.exit(f"not asked before: {{arguments}}")
"""


@pytest.fixture(autouse=True)
def machines_end(lab: Lab) -> Iterator[None]:
    yield
    lab.stop()


class Release:
    """Files of two releases of K3s below an address, and the folder that stands for its cluster."""

    def __init__(self, vendor: Vendor, cluster: Path) -> None:
        self.vendor = vendor
        self.cluster = cluster
        (cluster / "nodes").mkdir(parents=True)
        self.digests = {}
        for version in ("v1.34.9+k3s1", "v1.34.10+k3s1"):
            text = K3S.format(version=version, cluster=cluster)
            (vendor.folder / f"k3s-{version}").write_text(text)
            self.digests[version] = hashlib.sha256(text.encode()).hexdigest()

    def settings(self, version: str = "v1.34.9+k3s1", **more: Any) -> dict[str, Any]:
        return {
            "k3s_version": version,
            "k3s_binary_url": f"{self.vendor.url}k3s-{version}",
            "k3s_binary_checksum": self.digests[version],
            "k3s_wait_seconds": 60,
            **more,
        }


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    vendor = Vendor(tmp_path)
    with vendor.served():
        yield Release(vendor, tmp_path / "cluster")


def started(machine: Machine, unit: str) -> str:
    return machine.call("systemctl", "show", "-P", "ExecMainStartTimestampMonotonic", unit)


def test_cluster(lab: Lab, release: Release) -> None:
    """A server and an agent; nothing to do; drift; one more agent; an upgrade; another choice."""
    shared = shared_python() | {release.cluster: "rw"}
    lab.boot("s1", "a1", shared=shared)
    s1, a1 = lab.machines["s1"], lab.machines["a1"]
    secrets = {"vault_k3s_token": TOKEN}
    groups = {"k3s_server": [s1], "k3s_agents": [a1], "gpu_nodes": [a1]}
    inventory = lab.inventory(groups, secrets=secrets, **release.settings())

    assert lab.play(PLAYBOOK, inventory, "--check").changed("s1", "a1") > 0
    assert s1.call("sh", "-c", "ls /usr/local/bin/k3s || true") == ""
    assert lab.play(PLAYBOOK, inventory).changed("s1", "a1") > 0
    check_files(s1, a1)
    assert lab.play(PLAYBOOK, inventory).changed() == 0
    assert lab.play(PLAYBOOK, inventory, "--check").changed() == 0

    found = examined(s1, "containers.k3s")
    assert found["K3s"]["found"] == "the API is ready"
    assert found["K3s's runtime class"] | {"status": "ok"} == found["K3s's runtime class"]
    assert examined(a1, "containers.k3s")["K3s"]["found"].startswith("the agent runs")

    began = started(s1, "k3s"), started(a1, "k3s-agent")
    a1.call("sh", "-c", "echo 'node-ip: 192.0.2.1' > /etc/rancher/k3s/config.yaml")
    a1.call("chmod", "644", "/etc/rancher/k3s/token")
    play = lab.play(PLAYBOOK, inventory)
    assert (play.changed("s1"), play.changed("a1")) == (0, 3)
    assert started(s1, "k3s") == began[0]
    assert started(a1, "k3s-agent") != began[1]
    check_files(s1, a1)

    a2 = lab.boot("a2", shared=shared)
    groups["k3s_agents"] = [a1, a2]
    inventory = lab.inventory(groups, secrets=secrets, **release.settings())
    play = lab.play(PLAYBOOK, inventory)
    assert (play.changed("s1"), play.changed("a1")) == (0, 0)
    assert sorted(path.name for path in (release.cluster / "nodes").iterdir()) == ["a1", "a2", "s1"]

    newer = release.settings("v1.34.10+k3s1", k3s_gpu="gpu_operator")
    inventory = lab.inventory(groups, secrets=secrets, **newer)
    assert lab.play(PLAYBOOK, inventory).changed() > 0
    for machine, unit in ((s1, "k3s"), (a1, "k3s-agent"), (a2, "k3s-agent")):
        assert "v1.34.10+k3s1" in machine.read("/usr/local/bin/k3s")
        assert machine.call("systemctl", "is-active", unit) == "active"
    manifests = "/var/lib/rancher/k3s/server/manifests"
    assert s1.call("ls", manifests) == "nvidia-gpu-operator.yaml"
    assert s1.read("/root/deleted") == f"{manifests}/nvidia-device-plugin.yaml"
    chart = list(yaml.safe_load_all(s1.read(f"{manifests}/nvidia-gpu-operator.yaml")))[1]["spec"]
    assert (chart["chart"], chart["version"]) == ("gpu-operator", "v26.3.3")
    values = yaml.safe_load(chart["valuesContent"])
    assert values["driver"] == values["toolkit"] == {"enabled": False}
    assert lab.play(PLAYBOOK, inventory).changed() == 0

    a2.call("systemctl", "stop", "k3s-agent")
    found = examined(a2, "containers.k3s")["K3s"]
    assert (found["status"], found["found"]) == ("fail", "k3s-agent is inactive (dead)")


def check_files(s1: Machine, a1: Machine) -> None:
    common = {"token-file": "/etc/rancher/k3s/token"}
    assert yaml.safe_load(s1.read("/etc/rancher/k3s/config.yaml")) == common | {
        "node-name": "s1",
        "node-ip": s1.address,
        "https-listen-port": 6443,
        "secrets-encryption": True,
        "write-kubeconfig-mode": "0600",
    }
    assert yaml.safe_load(a1.read("/etc/rancher/k3s/config.yaml")) == common | {
        "node-name": "a1",
        "node-ip": a1.address,
        "node-label": ["infinite-context/gpu=true"],
        "server": f"https://{s1.address}:6443",
    }
    for machine, unit in ((s1, "k3s"), (a1, "k3s-agent")):
        for file in ("token", "config.yaml"):
            mode = machine.call("stat", "-c", "%a %U", f"/etc/rancher/k3s/{file}")
            assert mode == "600 root", file
        assert machine.read("/etc/rancher/k3s/token") == TOKEN
        assert machine.call("systemctl", "is-enabled", unit) == "enabled"
        assert machine.call("systemctl", "is-active", unit) == "active"
        machine.call("systemd-analyze", "verify", f"/etc/systemd/system/{unit}.service")


def test_device_plugin_by_kubernetes_schema(lab: Lab, tmp_path: Path) -> None:
    """Rendered with the role's defaults; `--strict` refuses fields that do not exist."""
    role = "roles/k3s"
    template = (
        "lookup('ansible.builtin.template', 'roles/k3s/templates/nvidia-device-plugin.yaml.j2')"
    )
    made = tmp_path / "plugin.yaml"
    lab.tool(
        "ansible",
        *("localhost", "-m", "ansible.builtin.copy", "-c", "local"),
        *("-e", f"@{role}/defaults/main.yml", "-e", "ansible_managed=test"),
        *("-a", f'content="{{{{ {template} }}}}" dest={made}'),
    )
    lab.tool("kubernetes-validate", "--strict", "--version", "1.34.0", str(made))
    spec = yaml.safe_load(made.read_text())["spec"]["template"]["spec"]
    assert spec["runtimeClassName"] == "nvidia"
    assert "@sha256:" in spec["containers"][0]["image"]


def test_files_of_another_release(lab: Lab, release: Release, tmp_path: Path) -> None:
    """What lies here is refused before anything is changed; what is fetched is not installed."""
    machine = lab.boot("s1", shared={release.cluster: "rw"})
    secrets = {"vault_k3s_token": TOKEN}
    (tmp_path / "k3s").write_text("another program")
    digest = hashlib.sha256(b"another program").hexdigest()
    settings = release.settings(k3s_binary_file=str(tmp_path / "k3s"))
    inventory = lab.inventory({"k3s_server": [machine]}, secrets=secrets, **settings)
    said = refused(lab.play(PLAYBOOK, inventory))
    expected = release.digests["v1.34.9+k3s1"]
    assert said.startswith(
        f"{tmp_path}/k3s has the sha256 {digest}. That of v1.34.9+k3s1 is {expected}."
    )
    said = refused(lab.play(PLAYBOOK, inventory, "-e", f"k3s_binary_file={tmp_path}/none"))
    assert said.startswith(f"{tmp_path}/none does not exist.")

    settings = release.settings() | {"k3s_binary_checksum": digest}
    inventory = lab.inventory({"k3s_server": [machine]}, secrets=secrets, **settings)
    play = lab.play(PLAYBOOK, inventory)
    assert play.code != 0
    assert "did not match" in play.output
    assert (
        machine.call("sh", "-c", "ls /usr/local/bin /etc/rancher 2>/dev/null || true")
        == "/usr/local/bin:"
    )


def test_files_that_lie_here(lab: Lab, release: Release, tmp_path: Path) -> None:
    """A closed network: nothing is fetched, for the address answers nothing."""
    machine = lab.boot("s1", shared={release.cluster: "rw"})
    images, chart = tmp_path / "images.tar.zst", tmp_path / "gpu-operator.tgz"
    images.write_text("images")
    chart.write_text("chart")
    inventory = lab.inventory(
        {"k3s_server": [machine]},
        secrets={"vault_k3s_token": TOKEN},
        **release.settings(
            k3s_binary_file=str(release.vendor.folder / "k3s-v1.34.9+k3s1"),
            k3s_images_file=str(images),
            k3s_images_checksum=hashlib.sha256(b"images").hexdigest(),
            k3s_gpu="gpu_operator",
            k3s_gpu_operator_chart_file=str(chart),
            k3s_registries={"mirrors": {"docker.io": {"endpoint": ["https://mirror.example.org"]}}},
        )
        | {"k3s_binary_url": "http://127.0.0.1:1/none"},
    )
    assert lab.play(PLAYBOOK, inventory).changed("s1") > 0
    folder = "/var/lib/rancher/k3s"
    assert machine.read(f"{folder}/agent/images/k3s-airgap-images-amd64.tar.zst") == "images"
    assert machine.read(f"{folder}/server/static/charts/gpu-operator.tgz") == "chart"
    manifest = machine.read(f"{folder}/server/manifests/nvidia-gpu-operator.yaml")
    spec = list(yaml.safe_load_all(manifest))[1]["spec"]
    assert spec["chart"] == "https://%{KUBERNETES_API}%/static/charts/gpu-operator.tgz"
    assert "repo" not in spec
    registries = yaml.safe_load(machine.read("/etc/rancher/k3s/registries.yaml"))
    assert registries["mirrors"]["docker.io"]["endpoint"] == ["https://mirror.example.org"]
    assert lab.play(PLAYBOOK, inventory).changed() == 0


def test_groups_that_are_no_cluster(lab: Lab) -> None:
    lab.boot("s1", "s2")
    s1, s2 = lab.machines["s1"], lab.machines["s2"]
    secrets = {"vault_k3s_token": TOKEN}
    inventory = lab.inventory({"k3s_server": [s1, s2]}, secrets=secrets)
    assert refused(lab.play(PLAYBOOK, inventory)).startswith("The group k3s_server has 2 machines")
    inventory = lab.inventory({"k3s_server": [s1], "k3s_agents": [s1, s2]}, secrets=secrets)
    assert "of which in k3s_agents, too: s1." in refused(lab.play(PLAYBOOK, inventory))
    inventory = lab.inventory({"k3s_server": [s1], "slurm_compute": [s1]}, secrets=secrets)
    assert refused(lab.play(PLAYBOOK, inventory)).startswith(
        "s1 is in the group slurm_compute and in k3s_server or k3s_agents."
    )
