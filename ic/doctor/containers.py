"""Whether containers get GPUs, from Docker (setup_docker.yml) and from K3s (setup_k3s.yml)."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ic.doctor.ask import call, not_here, said, stopped, unit
from ic.doctor.check import Finding

# Where the playbook puts it; sudo and cron do not always look there.
K3S = "/usr/local/bin/k3s"


def docker() -> Iterator[Finding]:
    """Docker's daemon, and NVIDIA's runtime on a machine with GPUs."""
    if shutil.which("docker") is None:
        yield not_here("Docker", "setup_docker.yml")
        return
    if unit("docker") is None and not Path("/var/run/docker.sock").exists():
        yield Finding("Docker", "ok", "its client alone; ansible/setup_docker.yml brings the rest")
        return
    done = call("docker", "info", "--format", "{{json .}}")
    information = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    if done.returncode or information.get("ServerErrors"):
        fix = (
            "join the group docker, or systemctl status docker; ansible/setup_docker.yml starts it"
        )
        yield Finding("Docker", "fail", said(done), fix)
        return
    found = f"Docker {information.get('ServerVersion')}"
    described = {device.get("ID", "") for device in information.get("DiscoveredDevices") or []}
    offers = "nvidia" in information.get("Runtimes", {}) or any(
        name.startswith("nvidia.com/gpu") for name in described
    )
    if shutil.which("nvidia-smi") is None:
        yield Finding("Docker", "ok", f"{found}, no GPU here to offer")
    elif offers:
        yield Finding("Docker", "ok", f"{found}, offers GPUs")
    else:
        yield Finding(
            "Docker",
            "warn",
            f"{found} knows neither NVIDIA's runtime nor CDI devices: no GPUs for containers",
            "run ansible/setup_nvidia_drivers.yml, then ansible/setup_docker.yml",
        )


def k3s() -> Iterator[Finding]:
    """K3s's service; on a server its API, the runtime class, and the GPUs that it offers here."""
    playbook = "setup_k3s.yml"
    units = {name: state for name in ("k3s", "k3s-agent") if (state := unit(name))}
    if not units:
        yield not_here("K3s", playbook)
        return
    (name, state), *_ = units.items()
    if finding := stopped("K3s", name, state, playbook):
        yield finding
        return
    if name == "k3s-agent":
        yield Finding("K3s", "ok", "the agent runs; ask a server for its state")
        return
    ready = call(K3S, "kubectl", "get", "--raw", "/readyz")
    if ready.returncode:
        fix = "as root; journalctl -u k3s says why, and ansible/setup_k3s.yml starts it"
        yield Finding("K3s", "fail", f"the API does not answer: {said(ready)}", fix)
        return
    yield Finding("K3s", "ok", "the API is ready")
    asked = call(K3S, "kubectl", "get", "runtimeclass", "nvidia", "--output=name")
    if asked.returncode:
        yield Finding(
            "K3s's runtime class",
            "warn",
            f"no class nvidia: {said(asked)}",
            "run ansible/setup_nvidia_drivers.yml, then ansible/setup_k3s.yml",
        )
    else:
        yield Finding("K3s's runtime class", "ok", "nvidia")
    if shutil.which("nvidia-smi") is not None:
        yield allocatable(socket.gethostname())


def allocatable(node: str) -> Finding:
    """How many GPUs pods may ask for on this node, against those that the driver sees."""
    path = r"--output=jsonpath={.status.allocatable.nvidia\.com/gpu}"
    offered = call(K3S, "kubectl", "get", "node", node, path)
    seen = len(call("nvidia-smi", "--list-gpus").stdout.splitlines())
    found = f"{offered.stdout.strip() or 0} of {seen} GPUs for pods"
    if offered.returncode == 0 and offered.stdout.strip() == str(seen):
        return Finding("K3s's GPUs", "ok", found)
    return Finding(
        "K3s's GPUs",
        "warn",
        found,
        "kubectl -n kube-system logs daemonset/nvidia-device-plugin; "
        "ansible/setup_k3s.yml deploys it",
    )
