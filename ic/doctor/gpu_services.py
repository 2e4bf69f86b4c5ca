"""What ansible/setup_nvidia_drivers.yml sets up beside the driver itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from ic.doctor.ask import call, exporter, not_here, said, unit
from ic.doctor.check import Finding

PLAYBOOK = "setup_nvidia_drivers.yml"


def gpu_services() -> Iterator[Finding]:
    """Persistence, NVLink's fabric, the container toolkit and DCGM's exporter."""
    if shutil.which("nvidia-smi") is None:
        yield not_here("GPU services", PLAYBOOK)
        return
    asked = call(
        "nvidia-smi",
        "--query-gpu=persistence_mode,fabric.state,fabric.status",
        "--format=csv,noheader",
    )
    if asked.returncode == 0:
        rows = [[cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines()]
        yield persistence([row[0] for row in rows])
        yield fabric([(row[1], row[2]) for row in rows])
        yield nvlink(call("nvidia-smi", "nvlink", "--status").stdout)
    else:
        yield Finding(
            "GPU services",
            "fail",
            said(asked),
            f"reboot after an update of the driver; ansible/{PLAYBOOK} installs it anew",
        )
    yield toolkit()
    yield dcgm()


def persistence(modes: list[str]) -> Finding:
    """Whether the driver stays loaded between jobs; loading it takes seconds for each GPU."""
    off = sum(mode != "Enabled" for mode in modes)
    if off:
        return Finding(
            "persistence mode",
            "warn",
            f"off on {off} of {len(modes)} GPUs: the driver is loaded anew for each job",
            f"ansible/{PLAYBOOK} keeps it on; nvidia-smi -pm 1 until the next boot",
        )
    return Finding("persistence mode", "ok", f"on, {len(modes)} GPUs")


def fabric(states: list[tuple[str, str]]) -> Finding:
    """Whether the GPUs behind NVSwitches have joined their fabric; CUDA fails until they have.

    Args:
        states: `fabric.state` and `fabric.status` of each GPU, as nvidia-smi says them.
    """
    joined = [pair for pair in states if "N/A" not in pair[0] and "Not Supported" not in pair[0]]
    if not joined:
        return Finding("NVLink fabric", "ok", "no NVSwitch here, no fabric manager needed")
    waiting = [pair for pair in joined if pair != ("Completed", "Success")]
    if waiting:
        state, status = waiting[0]
        return Finding(
            "NVLink fabric",
            "fail",
            f"{len(waiting)} of {len(joined)} GPUs have not joined: {state}, {status}",
            "systemctl status nvidia-fabricmanager: its version must be the driver's; "
            f"ansible/{PLAYBOOK} installs it",
        )
    return Finding("NVLink fabric", "ok", f"{len(joined)} GPUs have joined")


def nvlink(status: str) -> Finding:
    """`nvidia-smi nvlink --status`: links that are down make collectives slow."""
    links = re.findall(r"^\s*Link \d+: (.*)$", status, re.M)
    if not links:
        return Finding("NVLink", "ok", "no links here")
    down = sum("inactive" in link for link in links)
    if down:
        return Finding(
            "NVLink",
            "warn",
            f"{down} of {len(links)} links are inactive",
            "nvidia-smi nvlink --status names them; check bridges, then the fabric manager",
        )
    return Finding("NVLink", "ok", f"{len(links)} links, each {links[0].strip()}")


def toolkit() -> Finding:
    """NVIDIA's container toolkit, and whether it has described the GPUs for containers (CDI)."""
    if shutil.which("nvidia-ctk") is None:
        return not_here("container toolkit", PLAYBOOK)
    version = call("nvidia-ctk", "--version").stdout.strip().splitlines()
    shown = version[0].removeprefix("NVIDIA Container Toolkit CLI ") if version else "installed"
    listed = call("nvidia-ctk", "cdi", "list")
    devices = re.findall(r"^nvidia\.com/gpu=\d+$", listed.stdout, re.M)
    if not devices:
        return Finding(
            "container toolkit",
            "warn",
            f"{shown}, but it has described no GPU for containers",
            f"systemctl restart nvidia-cdi-refresh; ansible/{PLAYBOOK} turns it on",
        )
    return Finding("container toolkit", "ok", f"{shown}, {len(devices)} GPUs for containers")


def dcgm() -> Finding:
    """DCGM's exporter, where its unit says that it listens."""
    name = "nvidia-dcgm-exporter"
    environment = (unit(name) or {}).get("Environment", "")
    given = re.search(r"DCGM_EXPORTER_LISTEN=(\S+)", environment)
    address = given[1] if given else "127.0.0.1:9400"
    if address.startswith(":"):
        address = f"127.0.0.1{address}"
    return exporter("DCGM exporter", name, f"http://{address}/metrics", "DCGM_FI_", PLAYBOOK)
