"""What the checks of services make of what the programs say; the services themselves are met on
machines in tests/ansible, and the programs' words below are theirs."""

from __future__ import annotations

import http.server
import shutil
import threading
from pathlib import Path

import pytest

from ic.doctor import ask, containers, gpu_services, monitoring, slurm_node
from ic.doctor.check import examine

NVLINK = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-4f4f)
\t Link 0: 26.562 GB/s
\t Link 1: {second}
"""
NODE = (
    "NodeName=n1 Arch=x86_64 CoresPerSocket=1 CPUAlloc=0 CPUTot=2 Gres=gpu:h100:2(S:0) "
    "NodeAddr=127.0.1.2 State={state} ThreadsPerCore=1 Partitions=gpu CapWatts=n/a{reason}\n"
)
CONFIG = """JobRequeue              = 1
ProctrackType           = {proctrack}
TaskPlugin              = {task}
"""
CGROUP2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"


def test_what_is_not_here_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any of the services: every finding is ok and names its playbook."""
    monkeypatch.setenv("PATH", "/nowhere")
    checks = [
        gpu_services.gpu_services,
        slurm_node.node,
        containers.docker,
        containers.k3s,
        monitoring.monitoring,
    ]
    findings = examine(checks)  # type: ignore[arg-type]
    assert {
        finding.what: finding.found.split("ansible/")[1].split()[0] for finding in findings
    } == {
        "GPU services": "setup_nvidia_drivers.yml",
        "slurmd": "setup_slurm.yml",
        "Docker": "setup_docker.yml",
        "K3s": "setup_k3s.yml",
        "node exporter": "setup_monitoring.yml",
        "Prometheus": "setup_monitoring.yml",
        "Alertmanager": "setup_monitoring.yml",
    }
    assert {finding.status for finding in findings} == {"ok"}


def test_persistence() -> None:
    assert gpu_services.persistence(["Enabled", "Enabled"]).found == "on, 2 GPUs"
    off = gpu_services.persistence(["Enabled", "Disabled", "Disabled"])
    assert (off.status, off.found.split(":")[0]) == ("warn", "off on 2 of 3 GPUs")
    assert "ansible/setup_nvidia_drivers.yml" in off.fix


def test_fabric() -> None:
    """As nvidia-smi says it of PCIe cards, of GPUs that have joined, and of such that have not."""
    assert gpu_services.fabric([("[N/A]", "[N/A]")] * 2).status == "ok"
    assert gpu_services.fabric([("Completed", "Success")] * 8).found == "8 GPUs have joined"
    waits = gpu_services.fabric([("Completed", "Success"), ("In Progress", "[N/A]")])
    assert waits.status == "fail"
    assert waits.found == "1 of 2 GPUs have not joined: In Progress, [N/A]"
    assert "nvidia-fabricmanager" in waits.fix


def test_nvlink() -> None:
    assert gpu_services.nvlink("").found == "no links here"
    assert gpu_services.nvlink(NVLINK.format(second="26.562 GB/s")).found == (
        "2 links, each 26.562 GB/s"
    )
    down = gpu_services.nvlink(NVLINK.format(second="<inactive>"))
    assert (down.status, down.found) == ("warn", "1 of 2 links are inactive")


@pytest.mark.parametrize("state", ["IDLE", "MIXED", "ALLOCATED+REQUEUED", "IDLE+PLANNED"])
def test_node_that_takes_jobs(state: str) -> None:
    finding = slurm_node.node_state("n1", NODE.format(state=state, reason=""))
    assert (finding.status, finding.found) == ("ok", state)


@pytest.mark.parametrize("state", ["DOWN*", "IDLE+DRAIN", "INVAL", "IDLE+NOT_RESPONDING"])
def test_node_that_takes_none(state: str) -> None:
    reason = "\n   Reason=health: GPU 0 has Xid 79 [root@2026-11-27T07:00:00]"
    finding = slurm_node.node_state("n1", NODE.format(state=state, reason=reason))
    assert finding.status == "warn"
    assert finding.found == f"{state}: health: GPU 0 has Xid 79"
    assert "scontrol update NodeName=n1 State=RESUME" in finding.fix


def test_gpus_of_a_node() -> None:
    shown = NODE.format(state="IDLE", reason="")
    assert slurm_node.node_gpus(shown, 2).status == "ok"
    fewer = slurm_node.node_gpus(shown, 8)
    assert (fewer.status, fewer.found) == ("fail", "SLURM hands out 2 of 8 GPUs")
    assert slurm_node.node_gpus("NodeName=n1 Gres=(null) State=IDLE", 1).status == "fail"


def test_cgroups() -> None:
    fenced = CONFIG.format(proctrack="proctrack/cgroup", task="task/affinity,task/cgroup")
    assert slurm_node.cgroups(fenced, CGROUP2).status == "ok"
    assert slurm_node.cgroups(fenced, "proc /proc proc rw 0 0\n").found.startswith("no cgroup2")
    loose = CONFIG.format(proctrack="proctrack/linuxproc", task="task/none")
    assert slurm_node.cgroups(loose, CGROUP2).found == (
        "not used (task/none, proctrack/linuxproc): a job can take all memory and all GPUs"
    )
    seen = slurm_node.cgroups(fenced + "ConstrainDevices        = no\n", CGROUP2)
    assert seen.found == "ConstrainDevices=no: a job sees the GPUs of others"


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ('ARGS="--web.listen-address=10.0.0.7:9100 --collector.x"', "10.0.0.7:9100"),
        ('ARGS="--web.listen-address=:9100"', "127.0.0.1:9100"),
        ('ARGS="--web.listen-address=0.0.0.0:9105"', "127.0.0.1:9105"),
        ('ARGS=""', "127.0.0.1:9999"),
    ],
)
def test_address_of_a_service(tmp_path: Path, options: str, address: str) -> None:
    (tmp_path / "service").write_text(options)
    assert monitoring.listens(tmp_path / "service", "127.0.0.1:9999") == address


def test_prometheus_with_a_target_that_is_down() -> None:
    """The answers are Prometheus's, shortened; a real one is asked in tests/ansible."""
    answers = {
        "/api/v1/rules": '{"data": {"groups": [{"rules": [{}, {}]}]}}',
        "/api/v1/targets?state=active": (
            '{"data": {"activeTargets": [{"health": "up"}, {"health": "down", "lastError": "refused",'
            ' "labels": {"job": "node", "instance": "n2"}}]}}'
        ),
    }

    class Prometheus(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path].encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Prometheus) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        rules, targets = monitoring.prometheus(url)
        server.shutdown()
    assert rules.found == f"answers at {url}, 2 rules"
    assert (targets.status, targets.found) == ("warn", "1 of 2 are down; node n2: refused")
    (silent,) = monitoring.prometheus(url)
    assert (silent.status, "does not answer" in silent.found) == ("fail", True)


def test_command_that_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "TIMEOUT_S", 0.1)
    done = ask.call(shutil.which("sleep") or "sleep", "60")
    assert (done.returncode, ask.said(done)) == (1, "no answer in 0.1 s")
    assert ask.said(ask.call("no-such-program")) == "no no-such-program here"
