"""A whole SLURM on this host: munge, MariaDB, slurmdbd, slurmctld, and a slurmd a node.

The daemons run in the foreground as children of the test, without systemd and cgroups; several
slurmd share the host under different node names, each with GPUs that are null devices.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "sbatch", "sacctmgr")
PACKAGES = "slurm-wlm slurmdbd slurm-wlm-mysql-plugin munge mariadb-server"
GPUS_PER_NODE = 2
POLL_S, LOOKS_BETWEEN_CHECKS = 0.05, 20
# States in which nothing more comes of a job.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def reason_not_to_run() -> str | None:
    """Why a SLURM cannot be started here, or None."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if missing:
        return f"no {', '.join(missing)}; on Debian: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as their owners"
    return None


class Cluster:
    """Start with `start`, use `call`, end with `stop`. Nodes are n1, n2, ..."""

    def __init__(self, base: Path, num_nodes: int) -> None:
        self.base = base
        self.nodes = [f"n{i + 1}" for i in range(num_nodes)]
        self.ports = _free_ports(2 + num_nodes)
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin",
            "SLURM_CONF": str(base / "slurm.conf"),
            # where libmariadb, below slurmdbd, looks for the database
            "MYSQL_UNIX_PORT": str(base / "mysql.sock"),
        }

    def start(self) -> None:
        self._write_configuration()
        self._start_munge()
        self._start_accounting()
        self.call("sacctmgr", "-i", "add", "cluster", "ci")
        self._spawn("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.until(
            lambda: (
                len(self.call("sinfo", "-hN", "-t", "idle", "-o", "%N").split()) == len(self.nodes)
            )
        )

    def start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node)

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            jobs = self.call("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:
                self.call("scancel", "-s", "KILL", "--full", *jobs, check=False)
                self.call("scancel", *jobs, check=False)
                self.until(lambda: not self.call("squeue", "-h", check=False))
        for process in reversed(self.daemons.values()):
            process.terminate()
            process.wait()

    def until(self, condition: Callable[[], object], job: str | None = None) -> None:
        """Poll for `condition()`, for as long as it can still come true.

        Raises:
            RuntimeError: a daemon, or the job that it is waited for, has come to its end before.
        """
        for look in itertools.count(1):
            if condition():
                return
            time.sleep(POLL_S)
            if look % LOOKS_BETWEEN_CHECKS:
                continue
            # The job may have come to both since; hence the condition once more.
            if job is not None and self.state(job) in ENDED and not condition():
                raise RuntimeError(f"job {job} is {self.state(job)} already")
            for name, process in self.daemons.items():
                if process.poll() is not None:
                    log = (self.base / f"{name}.out").read_text()[-2000:]
                    raise RuntimeError(f"{name} ended with code {process.returncode}:\n{log}")

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a SLURM command -> its output."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... of a job or one element of an array."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def reason(self, job: str) -> str:
        return self.call("squeue", "-h", "-j", job, "-o", "%r")

    def tasks(self, job: str, **variables: str) -> list[psutil.Process]:
        """The Python processes of a job's step whose environment has these values."""
        wanted = {"SLURM_JOB_ID": job, **variables}
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if "python" not in process.name():
                    continue
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            is_task = environment.get("SLURM_STEP_ID") == "0"
            if is_task and all(environment.get(k) == v for k, v in wanted.items()):
                found.append(process)
        return found

    def fail(self, node: str, job: str) -> None:
        """The node freezes, SLURM gives it up, its processes are gone."""
        daemon = psutil.Process(self.daemons.pop(node).pid)
        tasks = self.tasks(job, SLURMD_NODENAME=node)
        steps = [parent for task in tasks if (parent := task.parent()) is not None]
        lost = [daemon, *steps, *tasks]
        for process in lost:
            process.suspend()
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        for process in lost:
            process.kill()

    def _start_munge(self) -> None:
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key.name,
            "socket": "munge.sock",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        arguments = [f"--{name}={self.base / file}" for name, file in files.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *arguments)
        self.until((self.base / "munge.sock").is_socket)

    def _start_accounting(self) -> None:
        data, sock = self.base / "mysql", str(self.base / "mysql.sock")
        self.call(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            "--auth-root-authentication-method=socket",
            "--skip-test-db",
        )
        self._spawn(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={sock}",
            "--skip-networking",
            f"--pid-file={self.base / 'mysql.pid'}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        )
        client = ("mariadb", "--no-defaults", "-S", sock, "-e")

        def answers() -> bool:
            return subprocess.run((*client, "SELECT 1"), capture_output=True).returncode == 0

        self.until(answers)
        self.call(
            *client,
            "CREATE DATABASE slurm_acct_db; CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'ci';"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';",
        )
        self._spawn("slurmdbd", "slurmdbd", "-D")

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.ports[1])) == 0

        self.until(listens)

    def _spawn(self, name: str, *command: str) -> None:
        with (self.base / f"{name}.out").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _write_configuration(self) -> None:
        base, host, names = self.base, socket.gethostname().partition(".")[0], self.nodes
        munge = f"socket={base / 'munge.sock'}"
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 "
            f"RealMemory=100000 Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(names, self.ports[2:], strict=True)
        )
        (base / "slurm.conf").write_text(f"""\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self.ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo={munge}
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmdSpoolDir={base}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=5
# SLURM's own patience, whose defaults of seconds a busy machine outlasts; a day for the record of a job.
MessageTimeout=100
TCPTimeout=100
BatchStartTimeout=1000
SlurmdTimeout=0
MinJobAge=86400
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self.ports[1]}
AccountingStoragePass={base}/munge.sock
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
        for gpu in range(GPUS_PER_NODE):  # slurmd drops GPUs without a device file
            subprocess.run(
                ["mknod", "-m", "666", str(base / f"nvidia{gpu}"), "c", "1", "3"], check=True
            )
        (base / "gres.conf").write_text(
            f"NodeName={','.join(names)} Name=gpu File={base}/nvidia[0-{GPUS_PER_NODE - 1}]\n"
        )
        database = base / "slurmdbd.conf"
        database.write_text(f"""\
AuthType=auth/munge
AuthInfo={munge}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={self.ports[1]}
SlurmUser=root
PidFile={base}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=ci
StorageLoc=slurm_acct_db
""")
        database.chmod(0o600)


def _free_ports(count: int) -> list[int]:
    """Below those that connections take and `launch.sh` gives, so that the daemons still find them."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 20_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports[:count]
