"""Machines with NVIDIA's GPUs, as far as a machine without one can be made to look like it.

PCI devices, Secure Boot's variable and the loaded module are files of sysfs, which a machine's own
root can cover. The packages stand for NVIDIA's (tests/ansible/vendor.py); no module is loaded.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.lab import Lab
from tests.ansible.machines import Machine, free_ports
from tests.ansible.test_refusals import refused
from tests.ansible.vendor import Vendor, service

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
PLAYBOOK = "setup_nvidia_drivers.yml"
DRIVER, TOOLKIT, DCGM, EXPORTER = "595.71.05", "1.19.1-1", "1:4.5.3-1", "4.8.2-1"
NEWER = "610.43.02"
H100, V100, NVSWITCH = "0x2330", "0x1db5", "0x22a3"
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
TOOLKIT_PACKAGES = [
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
]
# What the real programs say of a machine with two GPUs.
NVIDIA_SMI = f"""#!/bin/sh
case $1 in
  --persistence-mode=1) touch /run/persistence ;;
  --query-gpu=driver_version,persistence_mode)
    for gpu in 0 1; do echo "{DRIVER}, $([ -e /run/persistence ] && echo Enabled || echo Disabled)"; done ;;
esac
"""
DAEMON = "#!/bin/sh\nexec sleep infinity\n"
DCGM_EXPORTER = """#!/usr/bin/python3
import http.server, os
class Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'DCGM_FI_DEV_GPU_TEMP{gpu="0"} 40\\n')
address, port = os.environ["DCGM_EXPORTER_LISTEN"].rsplit(":", 1)
assert os.environ["DCGM_REMOTE_HOSTENGINE_INFO"] == "localhost:5555"
http.server.HTTPServer((address, int(port)), Metrics).serve_forever()
"""


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vendor]:
    vendor = Vendor(tmp_path_factory.mktemp("vendor"))
    for version in (DRIVER, NEWER):
        pin = f"Package: nvidia-open\nPin: version {version}-*\nPin-Priority: 1000\n"
        name = f"nvidia-driver-pinning-{version}"
        vendor.add(name, f"{version}-1", {"/etc/apt/preferences.d/nvidia-driver-pin": pin})
        vendor.add("nvidia-open", f"{version}-1", {"/usr/bin/nvidia-smi": NVIDIA_SMI})
        for package in ("nvidia-persistenced", "nvidia-fabricmanager"):
            vendor.add(
                package,
                f"{version}-1",
                {
                    f"/usr/bin/{package}": DAEMON,
                    f"/lib/systemd/system/{package}.service": service(f"/usr/bin/{package}"),
                },
            )
    for package in TOOLKIT_PACKAGES:
        files = {}
        if package == "nvidia-container-toolkit-base":
            files = {
                "/lib/systemd/system/nvidia-cdi-refresh.path": (
                    "[Path]\nPathExists=/lib/modules/none\n[Install]\nWantedBy=multi-user.target\n"
                ),
                "/lib/systemd/system/nvidia-cdi-refresh.service": service("/bin/true"),
            }
        for version in (TOOLKIT, "1.20.0-1"):
            vendor.add(package, version, files)
    vendor.add("datacenter-gpu-manager-4-proprietary", DCGM)
    vendor.add(
        "datacenter-gpu-manager-4-core",
        DCGM,
        {
            "/usr/bin/nv-hostengine": DAEMON,
            "/lib/systemd/system/nvidia-dcgm.service": service("/usr/bin/nv-hostengine"),
        },
    )
    unit = service("/usr/bin/dcgm-exporter")
    vendor.add(
        "datacenter-gpu-manager-exporter",
        EXPORTER,
        {
            "/usr/bin/dcgm-exporter": DCGM_EXPORTER,
            "/lib/systemd/system/nvidia-dcgm-exporter.service": unit,
        },
    )
    vendor.publish()
    with vendor.served():
        yield vendor


def settings(vendor: Vendor, **more: Any) -> dict[str, Any]:
    """The variables that lead to the vendor on this host."""
    return {
        "nvidia_cuda_repository": vendor.url,
        "nvidia_cuda_repository_key": vendor.key_url,
        "nvidia_cuda_repository_fingerprint": vendor.fingerprint,
        # Two sources of one address cannot have two keys.
        "nvidia_toolkit_repository": vendor.url.replace("127.0.0.1", "localhost"),
        "nvidia_toolkit_repository_key": vendor.key_url,
        "nvidia_toolkit_repository_fingerprint": vendor.fingerprint,
        **more,
    }


def plug(machine: Machine, *devices: str) -> None:
    """Let the machine see these devices of NVIDIA's on its PCI bus, and no other device."""
    machine.call("sh", "-c", "umount -q /sys/bus/pci/devices; rm -rf /run/pci; mkdir /run/pci")
    for index, device in enumerate(devices):
        folder = f"/run/pci/0000:{index:02x}:00.0"
        machine.call("mkdir", folder)
        machine.write(f"{folder}/vendor", "0x10de\n")
        machine.write(f"{folder}/device", f"{device}\n")
        kind = "0x068000" if device == NVSWITCH else "0x030200"
        machine.write(f"{folder}/class", f"{kind}\n")
    machine.call("mount", "--bind", "/run/pci", "/sys/bus/pci/devices")


def load(machine: Machine, version: str) -> None:
    """Let the machine see a loaded module of this version."""
    machine.call("mkdir", "-p", "/run/module/nvidia")
    machine.write("/run/module/nvidia/version", f"{version}\n")
    machine.call("sh", "-c", "mountpoint -q /sys/module || mount --bind /run/module /sys/module")


def give_headers(machine: Machine) -> None:
    machine.call("mkdir", "-p", f"/lib/modules/{platform.release()}/build")


@pytest.fixture(scope="module")
def bare(lab: Lab) -> Iterator[Machine]:
    """A machine for refusals; no test changes it."""
    yield lab.boot("bare")
    lab.kill("bare")


def test_no_gpu(lab: Lab, vendor: Vendor, bare: Machine) -> None:
    plug(bare, NVSWITCH)
    inventory = lab.inventory({"gpu_nodes": [bare]}, **settings(vendor))
    said = refused(lab.play(PLAYBOOK, inventory))
    assert said.startswith("bare has no NVIDIA GPU on its PCI bus.")
    assert "Nothing was changed" in said


def test_gpu_that_is_too_old(lab: Lab, vendor: Vendor, bare: Machine) -> None:
    plug(bare, H100, V100)
    inventory = lab.inventory({"gpu_nodes": [bare]}, **settings(vendor))
    said = refused(lab.play(PLAYBOOK, inventory))
    assert said.startswith("The GPU at 0000:01:00.0 of bare (device 0x1db5) is older than Turing.")


def test_kernel_without_headers(lab: Lab, vendor: Vendor, bare: Machine) -> None:
    plug(bare, H100)
    inventory = lab.inventory({"gpu_nodes": [bare]}, **settings(vendor))
    said = refused(lab.play(PLAYBOOK, inventory))
    assert f"apt knows no package linux-headers-{platform.release()}" in said


def test_secure_boot(lab: Lab, vendor: Vendor, bare: Machine) -> None:
    plug(bare, H100)
    give_headers(bare)
    bare.call("mount", "-t", "tmpfs", "tmpfs", "/sys/firmware")
    bare.call("mkdir", "-p", str(Path(SECURE_BOOT).parent))
    try:
        bare.call("sh", "-c", rf"printf '\006\000\000\000\001' > {SECURE_BOOT}")
        inventory = lab.inventory({"gpu_nodes": [bare]}, **settings(vendor))
        said = refused(lab.play(PLAYBOOK, inventory))
        assert said.startswith(
            "Secure Boot is on at bare, and its kernel loads signed modules only."
        )
        assert "Set nvidia_secure_boot=sign" in said
        said = refused(lab.play(PLAYBOOK, inventory, "-e", "nvidia_secure_boot=sign"))
        assert "Set vault_nvidia_mok_password in the vault" in said
    finally:
        bare.call("umount", "/sys/firmware")


def test_driver_in_use(lab: Lab, vendor: Vendor, bare: Machine) -> None:
    """Whoever has a GPU open is named; NVIDIA's own daemons do not count."""
    plug(bare, H100)
    give_headers(bare)
    load(bare, "580.105.08")
    bare.call("mknod", "-m", "666", "/dev/nvidia0", "c", "1", "3")
    bare.call("cp", "/usr/bin/sleep", "/run/nv-hostengine")
    bare.call("mount", "-o", "remount,exec", "/run")
    for name, program in (("job", "/usr/bin/sleep"), ("engine", "/run/nv-hostengine")):
        shell = f"exec {program} infinity </dev/nvidia0"
        bare.call("systemd-run", "-q", f"--unit={name}", "sh", "-c", shell)
    inventory = lab.inventory({"gpu_nodes": [bare]}, **settings(vendor))
    said = refused(lab.play(PLAYBOOK, inventory))
    pid = bare.call("systemctl", "show", "-P", "MainPID", "job")
    assert said.startswith(
        f"Driver 580.105.08 of bare is in use by sleep (pid {pid}), and would be replaced by {DRIVER}."
    )
    bare.call("systemctl", "stop", "job", "engine")
    bare.call("umount", "/sys/module")


def test_key_of_somebody_else(lab: Lab, vendor: Vendor) -> None:
    """No source is written, and no key is left."""
    machine = lab.boot("wary")
    plug(machine, H100)
    give_headers(machine)
    expected = "EB693B3035CD5710E231E123A4B469963BF863CC"
    inventory = lab.inventory(
        {"gpu_nodes": [machine]}, **settings(vendor, nvidia_cuda_repository_fingerprint=expected)
    )
    play = lab.play(PLAYBOOK, inventory)
    assert play.code != 0
    assert f"is {vendor.fingerprint}, and not {expected}." in play.output, play.output
    assert machine.call("ls", "/etc/apt/keyrings") == ""
    assert "nvidia" not in machine.call("ls", "/etc/apt/sources.list.d")
    lab.kill("wary")


def test_set_up(lab: Lab, vendor: Vendor) -> None:
    """Packages, pins, services and the stop for a reboot; then nothing to do; then drift."""
    machine = lab.boot("gpu")
    plug(machine, H100, H100, NVSWITCH)
    give_headers(machine)
    listen = f"{machine.address}:{free_ports(1)[0]}"
    inventory = lab.inventory(
        {"gpu_nodes": [machine]}, **settings(vendor, nvidia_dcgm_exporter_listen=listen)
    )
    first_check = lab.play(PLAYBOOK, inventory, "--check")
    assert first_check.changed("gpu") > 0
    assert machine.call("sh", "-c", "dpkg-query -W 'nvidia-*' || true") == ""

    stopped = lab.play(PLAYBOOK, inventory)
    assert stopped.code != 0
    assert (
        f"gpu must be rebooted: driver {DRIVER} is installed, but the module says" in stopped.output
    ), stopped.output
    assert "set nvidia_reboot=true" in stopped.output

    load(machine, DRIVER)
    lab.play(PLAYBOOK, inventory).changed()
    wanted = {
        f"nvidia-driver-pinning-{DRIVER}": f"{DRIVER}-1",
        "nvidia-open": f"{DRIVER}-1",
        "nvidia-persistenced": f"{DRIVER}-1",
        "nvidia-fabricmanager": f"{DRIVER}-1",
        **dict.fromkeys(TOOLKIT_PACKAGES, TOOLKIT),
        "datacenter-gpu-manager-4-core": DCGM,
        "datacenter-gpu-manager-4-proprietary": DCGM,
        "datacenter-gpu-manager-exporter": EXPORTER,
    }
    for package, version in wanted.items():
        assert machine.call("dpkg-query", "-W", "-f", "${Version}", package) == version
    for unit in (
        *("nvidia-persistenced", "nvidia-fabricmanager", "nvidia-cdi-refresh.path"),
        *("nvidia-dcgm", "nvidia-dcgm-exporter"),
    ):
        assert machine.call("systemctl", "is-active", unit) == "active", unit
        assert machine.call("systemctl", "is-enabled", unit) == "enabled", unit
    asked = f"import urllib.request as u; print(u.urlopen('http://{listen}/metrics').read())"
    assert "DCGM_FI_DEV_GPU_TEMP" in machine.call("python3", "-c", asked)
    # An upgrade by hand or by night leaves the versions alone, though the vendor has newer ones.
    simulated = machine.call("apt-get", "--simulate", "dist-upgrade")
    assert not [line for line in simulated.splitlines() if line.startswith("Inst")], simulated

    assert lab.play(PLAYBOOK, inventory).changed() == 0
    assert lab.play(PLAYBOOK, inventory, "--check").changed() == 0

    machine.call("systemctl", "stop", "nvidia-dcgm-exporter")
    machine.call("rm", "/etc/apt/preferences.d/infinite-context-nvidia")
    machine.call("sh", "-c", "echo other > /etc/apt/keyrings/nvidia-cuda.asc")
    # The key is fetched, put in its place, and its copy removed; the pins; the service.
    assert lab.play(PLAYBOOK, inventory).changed() == 5
    assert machine.call("systemctl", "is-active", "nvidia-dcgm-exporter") == "active"
    assert "BEGIN PGP PUBLIC KEY BLOCK" in machine.read("/etc/apt/keyrings/nvidia-cuda.asc")
    assert lab.play(PLAYBOOK, inventory).changed() == 0
    lab.kill("gpu")


def test_fewer_gpus_than_there_are(lab: Lab, vendor: Vendor) -> None:
    """nvidia-smi lists two of three: the run fails, and says what to look at."""
    machine = lab.boot("broken")
    plug(machine, H100, H100, H100)
    give_headers(machine)
    load(machine, DRIVER)
    inventory = lab.inventory(
        {"gpu_nodes": [machine]},
        **settings(vendor, nvidia_dcgm_exporter=False, nvidia_container_toolkit=False),
    )
    play = lab.play(PLAYBOOK, inventory)
    assert play.code != 0
    assert "broken has 3 GPUs on its PCI bus, and nvidia-smi should list as many" in play.output
    for package in ("nvidia-container-toolkit", "datacenter-gpu-manager-exporter"):
        status = machine.call("sh", "-c", f"dpkg-query -W -f '${{Version}}' {package} || true")
        assert status == "", "it was installed though it was not wanted"
    lab.kill("broken")
