"""What can be said of the playbooks and roles without a machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.ansible.lab import ANSIBLE, TOOLS

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
ROLES = sorted(path for path in (ANSIBLE / "roles").iterdir() if path.is_dir())
SECRET = re.compile(r"(password|token|secret|munge_key)$")


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if not (TOOLS / name).exists():
        pytest.skip(f"no {TOOLS}/{name}: make infra-env")
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "NO_COLOR": "1"}
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, cwd=ANSIBLE, env=environment, capture_output=True, text=True)


def test_production_profile() -> None:
    done = tool("ansible-lint", "--offline", "--nocolor", "--profile", "production")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_role_explains_itself(role: Path) -> None:
    """Each has a README, and each of its variables is in the specification of its arguments."""
    assert (role / "README.md").read_text().startswith(f"# {role.name}\n")
    specified = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())
    options = {
        name: option
        for entry in specified["argument_specs"].values()
        for name, option in entry.get("options", {}).items()
    }
    assert all(option.get("description") for option in options.values())
    defaults = role / "defaults" / "main.yml"
    given = yaml.safe_load(defaults.read_text()) if defaults.exists() else {}
    assert set(given or {}) <= set(options)


def test_no_secret_in_the_open() -> None:
    files = [*ANSIBLE.rglob("defaults/main.yml"), *(ANSIBLE / "inventories").rglob("*.yml*")]
    assert files
    for file in files:
        values = yaml.safe_load(file.read_text()) or {}
        for name, value in values.items():
            if SECRET.search(name):
                assert value == "" or "{{" in value, f"{file}: {name}"
