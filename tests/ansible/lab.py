"""What a test of the playbooks needs: machines, an inventory with a vault, and ansible-playbook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ansible.machines import Machine, free_addresses, make_key, sweep

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = ROOT / "ansible"
# The environment of `make infra-env`.
TOOLS = Path(os.environ.get("INFRA", ROOT / ".venv-infra")).absolute() / "bin"
# Not a secret: it locks what a test made up.
PASSWORD = "the password of the tests' vault"


@dataclass
class Play:
    """What one ansible-playbook did.

    Attributes:
        code: its exit code.
        output: standard output and standard error.
        recap: by machine, the counts of its last lines: ok, changed, unreachable, failed, ...
        seconds: how long it took.
    """

    code: int
    output: str
    recap: dict[str, dict[str, int]]
    seconds: float

    def changed(self, *names: str) -> int:
        """How many tasks changed something on these machines, by default on all.

        Raises:
            AssertionError: the play failed; with its output.
        """
        assert self.code == 0, self.output
        return sum(self.recap[name]["changed"] for name in names or self.recap)


class Lab:
    """Machines and plays of one session; `log` keeps how long each play took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, Machine] = {}
        self.log: list[str] = []
        self._addresses = iter(free_addresses())
        self._num_inventories = self._num_boots = 0
        sweep()
        make_key(folder / "key")
        (folder / "password").write_text(PASSWORD)

    def boot(self, *names: str, gpus: int = 0, shared: dict[Path, str] | None = None) -> Machine:
        """Boot a machine of each name, and wait for all -> the last one.

        Args:
            gpus: device files /dev/nvidia0, ... on each.
            shared: folders and files of this host that the machines see at the same path, each
                with "ro" or "rw".
        """
        began = time.monotonic()
        for name in names:
            assert name not in self.machines, f"{name} runs"
            self._num_boots += 1
            self.machines[name] = Machine(
                self.folder / f"{name}-{self._num_boots}",
                name,
                next(self._addresses),
                gpus,
                shared or {},
                self.folder / "key",
            )
        for name in names:
            self.machines[name].wait()
        self.log.append(f"{time.monotonic() - began:6.1f} s  boot {' '.join(names)}")
        return self.machines[names[-1]]

    def kill(self, name: str) -> None:
        """Cut a machine's power; its disk is lost."""
        self.machines.pop(name).kill()

    def stop(self) -> None:
        for name in list(self.machines):
            self.kill(name)

    def inventory(
        self,
        groups: dict[str, list[Machine]],
        *,
        secrets: dict[str, str] | None = None,
        host_variables: dict[str, dict[str, Any]] | None = None,
        **variables: Any,
    ) -> Path:
        """Write an inventory -> its folder.

        Args:
            groups: the machines of each group.
            secrets: go into a file that ansible-vault encrypts; plays get its password.
            host_variables: by name of the machine.
            variables: for all machines.
        """
        self._num_inventories += 1
        folder = self.folder / f"inventory-{self._num_inventories}"
        (folder / "group_vars" / "all").mkdir(parents=True)
        machines = {machine.name: machine for group in groups.values() for machine in group}
        hosts = {
            name: {"ansible_host": machine.address, **(host_variables or {}).get(name, {})}
            for name, machine in machines.items()
        }
        children = {
            group: {"hosts": {machine.name: {} for machine in members}}
            for group, members in groups.items()
        }
        tree = {"all": {"hosts": hosts, "children": children}}
        (folder / "hosts.json").write_text(json.dumps(tree))
        (folder / "group_vars" / "all" / "main.json").write_text(
            json.dumps({"ansible_user": "root", **variables})
        )
        if secrets:
            vault = folder / "group_vars" / "all" / "vault.json"
            vault.write_text(json.dumps(secrets))
            self.tool("ansible-vault", "encrypt", str(vault), *self._password())
        return folder

    def play(self, playbook: str, inventory: Path, *arguments: str, vault: bool = True) -> Play:
        """Run a playbook of ansible/; without `vault` it does not get the vault's password."""
        began = time.monotonic()
        done = subprocess.run(
            [
                str(TOOLS / "ansible-playbook"),
                *("-i", str(inventory), playbook),
                *(self._password() if vault else ()),
                *arguments,
            ],
            cwd=ANSIBLE,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        seconds = time.monotonic() - began
        recap = {
            name: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", counts)}
            for name, counts in re.findall(r"^(\S+)\s+: (ok=.*)$", done.stdout, re.M)
        }
        counts = ", ".join(f"{name} {host['changed']}" for name, host in recap.items())
        shown = " ".join([playbook, *arguments])
        self.log.append(f"{seconds:6.1f} s  {shown}: code {done.returncode}, changed: {counts}")
        return Play(done.returncode, done.stdout, recap, seconds)

    def tool(self, name: str, *arguments: str) -> str:
        """Run a program of the tools' environment in ansible/ -> its output."""
        done = subprocess.run(
            [str(TOOLS / name), *arguments],
            cwd=ANSIBLE,
            env=self._environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _password(self) -> tuple[str, ...]:
        return ("--vault-password-file", str(self.folder / "password"))

    def _environment(self) -> dict[str, str]:
        """Ansible believes the machines by their keys, as it would in a data centre."""
        known = self.folder / "known_hosts"
        known.write_text("".join(machine.known_host() for machine in self.machines.values()))
        return {
            **os.environ,
            "PATH": f"{TOOLS}:{os.environ['PATH']}",
            "ANSIBLE_PRIVATE_KEY_FILE": str(self.folder / "key"),
            "ANSIBLE_SSH_COMMON_ARGS": f"-o UserKnownHostsFile={known} -o GlobalKnownHostsFile=none",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "ssh"),
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "ansible"),
            "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORCE_COLOR": "0",
        }
