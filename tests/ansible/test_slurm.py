"""setup_slurm.yml on machines with systemd: a controller and nodes that come, fail and are replaced."""

from __future__ import annotations

import base64
import csv
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ansible.lab import ROOT, Lab, Play
from tests.ansible.machines import Machine, free_ports
from tests.conftest import SHORT

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

GPUS = 2
PLAYBOOK = "setup_slurm.yml"


class Cluster:
    """ctl, n1, n2 and whoever joins them, and the inventory that they are made from."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.secrets = {
            "vault_slurm_munge_key": base64.b64encode(secrets.token_bytes(128)).decode(),
            "vault_slurm_database_password": secrets.token_hex(24),
        }
        self.ports = free_ports(8)
        self.nodes: list[str] = []
        self.shared = dict.fromkeys(_python(), "ro") | {ROOT: "ro", folder: "rw"}

    @property
    def controller(self) -> Machine:
        return self.lab.machines["ctl"]

    def machines(self, *names: str) -> list[Machine]:
        return [self.lab.machines[name] for name in names]

    def boot(self, *names: str) -> None:
        self.lab.boot(*names, gpus=GPUS, shared=self.shared)

    def inventory(self) -> Path:
        # The machines share the network of this host, so each daemon needs a port of its own.
        ports = {name: {"slurm_node_port": self.ports[3 + i]} for i, name in enumerate(self.nodes)}
        return self.lab.inventory(
            {
                "slurm_controller": self.machines("ctl"),
                "slurm_accounting": self.machines("ctl"),
                "slurm_compute": self.machines(*self.nodes),
            },
            secrets=self.secrets,
            host_variables=ports,
            slurm_controller_port=self.ports[0],
            slurm_accounting_port=self.ports[1],
            slurm_database_buffer_mb=64,
            slurm_health_interval_s=0,  # the tests say when a node is looked at
            # A busy machine outlasts SLURM's own patience.
            slurm_extra_settings={"MessageTimeout": 100, "TCPTimeout": 100, "SlurmdTimeout": 0},
        )

    def play(self, *arguments: str) -> Play:
        return self.lab.play(PLAYBOOK, self.inventory(), *arguments)

    def call(self, *command: str, check: bool = True) -> str:
        return self.controller.call(*command, check=check)

    def srun(self, *arguments: str) -> list[str]:
        return sorted(self.call("timeout", "120", "srun", *arguments).splitlines())

    def submit(self, *arguments: str) -> str:
        variables = {
            "IC_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
        }
        given = [f"{name}={value}" for name, value in variables.items()]
        return self.call("env", "-C", str(ROOT), *given, "sbatch", "--parsable", *arguments)

    def wait_for(self, job: str, *states: str) -> None:
        """Raises: AssertionError: the job has ended otherwise."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
        while (
            state := self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")
        ) not in states:
            assert state not in ended, self.call("scontrol", "show", "job", job)

    def accounts(self, job: str, *columns: str) -> list[list[str]]:
        """sacct's rows of each start of a job, once it has heard of the end."""
        while True:
            given = ("--format", ",".join(("State", *columns)))
            rows = self.call("sacct", "-nXDP", "-j", job, *given).splitlines()
            if rows and not any(row.startswith(("PENDING", "RUNNING")) for row in rows):
                return [row.split("|") for row in rows]


def _python() -> list[Path]:
    """The folders that the Python of the tests consists of, those of the system aside."""
    parts = {Path(sys.base_prefix), Path(sys.prefix)}
    parts |= {Path(entry) for entry in sys.path if Path(entry).is_dir()}
    kept = sorted(
        part for part in parts if part != Path("/usr") and ROOT not in (part, *part.parents)
    )
    return [part for part in kept if not any(other in part.parents for other in kept)]


@pytest.fixture(scope="module")
def cluster(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes, set up by the playbook, which was only asked before what it would do."""
    cluster = Cluster(lab, tmp_path_factory.mktemp("jobs"))
    cluster.nodes = ["n1", "n2"]
    cluster.boot("ctl", *cluster.nodes)
    assert cluster.play("--check").changed("ctl", "n1", "n2") == 3, "the packages of each machine"
    assert not cluster.call("sh", "-c", "command -v slurmctld || true")
    first = cluster.play()
    assert all(first.changed(name) for name in ("ctl", "n1", "n2"))
    for secret in cluster.secrets.values():
        assert secret not in first.output
    yield cluster
    for name in ("ctl", *cluster.nodes):
        lab.kill(name)


def test_a_second_run_and_a_check_change_nothing(cluster: Cluster) -> None:
    assert cluster.play().changed() == 0
    assert cluster.play("--check", "--diff").changed() == 0


def test_a_job_of_a_user_runs_on_two_nodes(cluster: Cluster) -> None:
    assert cluster.srun("-N2", "hostname") == ["n1", "n2"]
    for name in ("ctl", *cluster.nodes):
        cluster.lab.machines[name].call("useradd", "--uid", "4711", "--create-home", "alice")
    shown = cluster.call(
        *(
            "runuser",
            "-u",
            "alice",
            "--",
            "timeout",
            "120",
            "srun",
            "-D/tmp",
            "-N2",
            "--gres=gpu:2",
        ),
        *("sh", "-c", "echo $(id -un) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"),
    )
    assert sorted(shown.splitlines()) == ["alice n1 0,1", "alice n2 0,1"]


def test_what_the_cluster_is_made_of(cluster: Cluster) -> None:
    node = cluster.call("scontrol", "show", "node", "n1", "--oneliner")
    assert f"Gres=gpu:{GPUS}" in node
    assert f"CPUTot={os.cpu_count()}" in node
    memory = int(re.findall(r"RealMemory=(\d+)", node)[0])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    assert total - 2048 - 1024 < memory <= total - 2048
    for name, mode in (
        ("/etc/munge/munge.key", "400 munge"),
        ("/etc/slurm/slurmdbd.conf", "600 slurm"),
    ):
        assert cluster.call("stat", "-c", "%a %U", name) == mode
    listening = cluster.call("ss", "-Hltnp", "-O")
    assert "mariadbd" not in listening, "the database is reached by its socket only"


def test_our_own_batch_file_trains_on_two_nodes(cluster: Cluster) -> None:
    job = cluster.submit(
        *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=4G"),
        f"--output={cluster.folder}/%x-%j.log",
        "slurm/train_pretrain.sbatch",
        *SHORT[1:],
        *("trainer.max_steps=4", "trainer.val_check_interval=4", "callbacks.memory=null"),
        *("overwrite=false", f"output_dir={cluster.folder}"),
    )
    try:
        cluster.wait_for(job, "COMPLETED")
    except AssertionError as error:
        log = "".join(path.read_text() for path in cluster.folder.glob("*.log"))
        raise AssertionError(f"{error}\n{log[-6000:]}") from None
    rows = list(csv.DictReader((cluster.folder / "debug" / job / "csv" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3"]
    [[state, nodes, resources]] = cluster.accounts(job, "NodeList", "AllocTRES")
    assert (state, nodes) == ("COMPLETED", "n[1-2]")
    assert "gres/gpu=2" in resources


def test_drift_is_shown_and_repaired(cluster: Cluster) -> None:
    n1, n2 = cluster.machines("n1", "n2")
    n1.call("sh", "-c", "echo another key of enough bytes, but wrong > /etc/munge/munge.key")
    n2.call("sed", "-i", "s/^KillWait=.*/KillWait=5/", "/etc/slurm/slurm.conf")
    n2.call("systemctl", "disable", "--now", "slurmd")
    n2.call("rm", "/etc/slurm/infinite-context/prolog")
    cluster.call("mariadb", "-e", "ALTER USER 'slurm'@'localhost' IDENTIFIED BY 'forgotten'")
    shown = cluster.play("--check", "--diff")
    assert all(shown.changed(name) for name in ("ctl", "n1", "n2"))
    assert "+KillWait=120" in shown.output
    assert "KillWait=5" in n2.read("/etc/slurm/slurm.conf"), "--check wrote"
    repaired = cluster.play("--diff")
    assert all(repaired.changed(name) for name in ("ctl", "n1", "n2"))
    for secret in cluster.secrets.values():
        assert secret not in shown.output + repaired.output
    assert n1.read("/etc/munge/munge.key") == cluster.secrets["vault_slurm_munge_key"]
    assert "KillWait=120" in n2.read("/etc/slurm/slurm.conf")
    assert n2.call("systemctl", "is-enabled", "slurmd") == "enabled"
    assert cluster.srun("-N2", "hostname") == ["n1", "n2"]


def test_an_unfit_node_is_drained_and_its_job_goes_elsewhere(cluster: Cluster) -> None:
    n1 = cluster.lab.machines["n1"]
    n1.call("mv", "/dev/nvidia1", "/dev/lost")
    job = cluster.submit("--wrap=hostname", "--gres=gpu:1", f"--output={cluster.folder}/%j.out")
    while "DRAIN" not in (node := cluster.call("scontrol", "show", "node", "n1", "--oneliner")):
        pass
    assert "Reason=node_health: 1 of 2 GPUs in /dev" in node
    cluster.wait_for(job, "PENDING", "COMPLETED")
    cluster.call("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
    cluster.wait_for(job, "COMPLETED")
    assert (cluster.folder / f"{job}.out").read_text() == "n2\n"
    # Nor does the playbook make a cluster with fewer GPUs without being told to.
    refused = cluster.play()
    assert refused.code == 2
    assert "n1 has 1 GPUs and had 2" in refused.output
    assert all(host["changed"] == 0 for host in refused.recap.values())
    n1.call("mv", "/dev/lost", "/dev/nvidia1")
    cluster.call("scontrol", "update", "nodename=n1", "state=resume")
    assert cluster.srun("-N2", "hostname") == ["n1", "n2"]


def test_a_node_joins_while_a_job_runs(cluster: Cluster) -> None:
    job = cluster.submit("--wrap=sleep infinity", "-w", "n1", "--output=/dev/null")
    cluster.wait_for(job, "RUNNING")
    cluster.boot("n3")
    cluster.nodes.append("n3")
    assert cluster.play().changed("n3")
    cluster.wait_for(job, "RUNNING")
    assert cluster.call("sacct", "-nXDP", "-j", job, "--format=State") == "RUNNING", "one start"
    cluster.call("scancel", job)
    assert cluster.srun("-N3", "hostname") == ["n1", "n2", "n3"]


def test_a_failed_node_is_replaced(cluster: Cluster) -> None:
    job = cluster.submit("--wrap=sleep infinity", "-w", "n2", "--requeue", "--output=/dev/null")
    cluster.wait_for(job, "RUNNING")
    cluster.lab.kill("n2")
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=dead")
    cluster.wait_for(job, "PENDING")
    cluster.call("scancel", job)
    assert cluster.accounts(job)[0][0] in ("NODE_FAIL", "REQUEUED")
    cluster.boot("n2")
    replaced = cluster.play()
    assert replaced.changed("n2")
    assert cluster.srun("-w", "n2", "--gres=gpu:2", "hostname") == ["n2"]
    assert cluster.srun("-N3", "hostname") == ["n1", "n2", "n3"]
    assert cluster.play().changed() == 0


def test_bad_input_is_refused_before_anything_changes(lab: Lab) -> None:
    bare = lab.boot("bare")
    groups = {name: [bare] for name in ("slurm_controller", "slurm_accounting", "slurm_compute")}
    good = {
        "vault_slurm_munge_key": base64.b64encode(secrets.token_bytes(128)).decode(),
        "vault_slurm_database_password": secrets.token_hex(24),
    }

    def refused(message: str, inventory: Path, *arguments: str) -> None:
        play = lab.play(PLAYBOOK, inventory, *arguments)
        assert play.code == 2, play.output
        assert message in " ".join(play.output.split())
        assert all(host["changed"] == 0 for host in play.recap.values())

    refused("Not set for bare: vault_slurm_munge_key", lab.inventory(groups))
    weak = {**good, "vault_slurm_database_password": "short"}
    refused("at least 16 letters", lab.inventory(groups, secrets=weak))
    wide = lab.inventory({**groups, "slurm_compute": [bare, lab.boot("other")]}, secrets=good)
    refused("Missing: other", wide, "--limit", "bare")
    missing = {name: group for name, group in groups.items() if name != "slurm_compute"}
    refused("The group slurm_compute of the inventory", lab.inventory(missing, secrets=good))
    bare.call("sed", "-i", "s/12/11/g", "/etc/os-release", "/etc/debian_version")
    refused("bare runs Debian 11.", lab.inventory(groups, secrets=good))
    lab.kill("bare")
    lab.kill("other")
