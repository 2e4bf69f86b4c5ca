"""The machines on which the playbooks are tested are machines: systemd, names, disks, deaths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ansible.lab import Lab

pytestmark = [pytest.mark.hosts, pytest.mark.slow]


def test_a_machine_is_one(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("seen")
    lab.boot("one", "two", gpus=2, shared={tmp_path: "ro"})
    one, two = lab.machines["one"], lab.machines["two"]
    one.until("systemctl", "is-system-running", output="running")
    assert one.read("/proc/1/comm") == "systemd"
    assert (one.call("hostname"), two.call("hostname")) == ("one", "two")
    assert one.call("sh", "-c", "ls /dev/nvidia*").split() == ["/dev/nvidia0", "/dev/nvidia1"]
    assert one.read(f"{tmp_path}/given") == "seen"
    with pytest.raises(RuntimeError, match="Read-only file system"):
        one.call("touch", f"{tmp_path}/given")
    with pytest.raises(RuntimeError, match="permission denied"):
        one.call("sysctl", "-w", "vm.swappiness=1")
    one.write("/etc/motd", "mine")
    assert two.call("sh", "-c", "cat /etc/motd || true") != "mine"
    lab.kill("one")
    again = lab.boot("one")
    assert again.call("sh", "-c", "cat /etc/motd || true") != "mine", (
        "the disk outlived the machine"
    )
    lab.kill("one")
    lab.kill("two")


def test_machines_die_with_the_process_that_made_them(lab: Lab, tmp_path: Path) -> None:
    script = f"""
import os, pathlib, signal
from tests.ansible.lab import Lab
machine = Lab(pathlib.Path({str(tmp_path)!r})).boot("orphan")
print(machine.call("sh", "-c", "systemd-run -q sleep infinity; echo started"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "started", done.stderr

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid not in before and process.name() in ("systemd", "sshd", "sleep"):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return [p for p in found if "ic-" in _cgroup(p)]

    psutil.wait_procs(left())
    assert not left()


def _cgroup(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cgroup").read_text()
    except OSError:
        return ""
