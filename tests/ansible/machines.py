"""Machines with a real systemd, made of namespaces: what the playbooks are tested on.

A machine is Debian 12 (a root file system that mmdebstrap makes once and that is kept outside the
tree) below an overlay, with systemd as PID 1, sshd on a loopback address of its own, and apt that
reaches the same mirror as this host. It shares the host's network, so two machines cannot listen on
the same port of all addresses; its sysctls are read-only and its cgroups have no controllers that
the host keeps for itself. GPUs are device files that lead to /dev/null.

    def test_it(lab: Lab) -> None:                                  # the fixture of conftest.py
        node = lab.boot("n1", gpus=2)                               # about a second
        inventory = lab.inventory({"docker_hosts": [node]}, docker_bridge="none")
        assert lab.play("setup_docker.yml", inventory).changed("n1") > 0
        assert node.call("systemctl", "is-active", "docker") == "active"

`lab.boot` again with the name of a machine that was killed is a fresh machine of that name. All of
it dies with the process that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PROGRAMS = ("mmdebstrap", "unshare", "setpriv", "nsenter", "ssh", "ssh-keygen", "ssh-keyscan")
SUITE = "bookworm"
PACKAGES = (
    "systemd,systemd-sysv,dbus,openssh-server,python3,python3-apt,sudo,iproute2,procps,kmod,gnupg,"
    # what a Python from elsewhere, which a test shares with a machine, links to
    "ca-certificates,libssl3,libffi8,libsqlite3-0,libreadline8,libncursesw6"
)
# What a machine has of the host: network, devices and seats are not its own.
MASKED = "systemd-resolved systemd-networkd systemd-udevd systemd-logind getty@tty1 console-getty"
OPTIONS = (
    "--variant=apt",
    "--skip=cleanup/apt/lists",
    f"--include={PACKAGES}",
    "--dpkgopt=force-unsafe-io",
    '--aptopt=Acquire::Languages "none"',
    f'--customize-hook=chroot "$1" systemctl mask {MASKED}',
    # Else systemd-tmpfiles empties /tmp at boot, below which a test may share a folder of this host.
    '--customize-hook=ln -s /dev/null "$1"/etc/tmpfiles.d/tmp.conf',
    '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*',
    SUITE,
)
BOOT = Path(__file__).parent / "boot.sh"
POLL_S = 0.05


def reason_not_to_run() -> str | None:
    """Why machines cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root: machines are made of namespaces and mounts"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}; on Debian: apt-get install mmdebstrap openssh-client"
    if _cgroup2() is None:
        return "no cgroup2 file system is mounted; systemd needs one"
    return None


def root_file_system() -> Path:
    """The folder that all machines are overlays of; made at the first call, which takes a minute.

    Its name holds the digest of how it is made. It lies below IC_ROOTFS, by default
    /var/tmp/infinite-context, and may be deleted at any time when no test runs.

    Raises:
        RuntimeError: mmdebstrap cannot make it, for example because no mirror is reached.
    """
    recipe = hashlib.sha256("\0".join(OPTIONS).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("IC_ROOTFS", "/var/tmp/infinite-context"))
    cache.mkdir(parents=True, exist_ok=True)
    made, partial = cache / f"{SUITE}-{recipe}", cache / f"{SUITE}-{recipe}.partial"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.is_dir():
            return made
        shutil.rmtree(partial, ignore_errors=True)
        options = [*OPTIONS, str(partial)]
        done = subprocess.run(["mmdebstrap", "--quiet", *options], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"mmdebstrap cannot make {SUITE}: {last}")
        partial.rename(made)
    return made


class Machine:
    """One machine; `Lab.boot` makes it.

    Attributes:
        name: its host name.
        address: its loopback address, on which sshd listens.
        gpus: how many device files /dev/nvidia0, ... it has.
    """

    def __init__(
        self, folder: Path, name: str, address: str, gpus: int, shared: dict[Path, str], key: Path
    ) -> None:
        self.name = name
        self.address = address
        self.gpus = gpus
        self._folder = folder
        self._cgroup = (_cgroup2() or Path()) / f"ic-{os.getpid()}-{name}"
        for part in ("upper", "work", "root"):
            (folder / part).mkdir(parents=True)
        (folder / "shared").write_text("".join(f"{m} {p}\n" for p, m in shared.items()))
        self._write_files(key)
        self._cgroup.mkdir(exist_ok=True)
        command = [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--fork"),
            *("--kill-child", "--propagation", "private"),
            *("bash", str(BOOT), str(root_file_system()), str(folder), name, str(gpus)),
        ]
        joined = f'echo $$ > "{self._cgroup}/cgroup.procs"; exec "$@"'
        with (folder / "console").open("w") as console:
            self._process = subprocess.Popen(
                ["bash", "-c", joined, "_", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until sshd answers.

        Raises:
            RuntimeError: the machine went down instead; with its console.
        """
        while not _connects(self.address, 22):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} does not boot:\n{self.console()}")
            time.sleep(POLL_S)

    def console(self) -> str:
        return (self._folder / "console").read_text()[-4000:]

    def call(self, *command: str, check: bool = True, stdin: str | None = None) -> str:
        """Run a command on the machine, as root and without ssh -> its output, stripped.

        Raises:
            RuntimeError: it failed, and `check` is set.
        """
        init = psutil.Process(self._process.pid).children()[0].pid
        enter = ["nsenter", "-t", str(init), "--mount", "--uts", "--ipc", "--pid", "--cgroup"]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
        done = subprocess.run(
            [*enter, "--", "env", "-C", "/", *command],
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            shown = f"{self.name}: {' '.join(command)}: {done.returncode}"
            raise RuntimeError(f"{shown}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def until(self, *command: str, output: str) -> None:
        """Wait until a command succeeds with this output; as long as the machine runs."""
        while self.call(*command, check=False) != output:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} went down:\n{self.console()}")
            time.sleep(POLL_S)

    def write(self, path: str, text: str) -> None:
        self.call("tee", path, stdin=text)

    def read(self, path: str) -> str:
        return self.call("cat", path)

    def kill(self) -> None:
        """As if its power were cut: no process of it is left, and its disk is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        # The kernel takes the rest of the PID namespace down after its first process.
        with contextlib.suppress(OSError):
            while (self._cgroup / "cgroup.events").read_text().startswith("populated 1"):
                time.sleep(POLL_S)
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(folder)
        shutil.rmtree(self._folder)

    def _write_files(self, key: Path) -> None:
        """Name, addresses, keys and apt's settings, before the machine starts."""
        etc = self._folder / "upper" / "etc"
        (etc / "ssh" / "sshd_config.d").mkdir(parents=True)
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "machine-id").write_text("")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        shutil.copy("/etc/resolv.conf", etc / "resolv.conf")
        shutil.copytree("/etc/apt/apt.conf.d", etc / "apt" / "apt.conf.d")
        certificates = Path("etc/ssl/certs/ca-certificates.crt")
        (self._folder / "upper" / certificates).parent.mkdir(parents=True)
        shutil.copy(Path("/") / certificates, self._folder / "upper" / certificates)
        (etc / "ssh" / "sshd_config.d" / "address.conf").write_text(
            f"ListenAddress {self.address}\nPermitRootLogin prohibit-password\n"
        )
        make_key(etc / "ssh" / "ssh_host_ed25519_key")
        root = self._folder / "upper" / "root"
        root.mkdir(mode=0o700)
        (root / ".ssh").mkdir(mode=0o700)
        shutil.copy(key.with_suffix(".pub"), root / ".ssh" / "authorized_keys")

    def known_host(self) -> str:
        """The line of known_hosts by which ssh believes the machine."""
        public = self._folder / "upper" / "etc" / "ssh" / "ssh_host_ed25519_key.pub"
        return f"{self.address} {' '.join(public.read_text().split()[:2])}\n"


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def sweep() -> None:
    """Remove the cgroups of machines whose process was killed; they are empty."""
    for group in (_cgroup2() or Path()).glob("ic-*-*"):
        if not psutil.pid_exists(int(group.name.split("-")[1])):
            for folder, _, _ in os.walk(group, topdown=False):
                os.rmdir(folder)


def free_addresses() -> Sequence[str]:
    """Loopback addresses of one net in which no sshd listens."""
    while True:
        net = f"127.{random.randint(1, 250)}.{random.randint(1, 250)}"
        addresses = [f"{net}.{last}" for last in range(1, 250)]
        if not _connects(addresses[0], 22):
            return addresses


def free_ports(count: int) -> list[int]:
    """Below those that connections take, so that a daemon still finds them free."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def _connects(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def _cgroup2() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    return None
