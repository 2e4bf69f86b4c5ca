"""The lists of packages of the images agree with what the tests are run with (make locks)."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "deploy/docker/requirements"
LOCKS = {lock.name: lock for lock in runpy.run_path(str(REQUIREMENTS / "lock.py"))["LOCKS"]}


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;]+)", path.read_text(), re.M)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("name", list(LOCKS))
def test_every_package_has_checksums(name: str) -> None:
    """pip installs nothing of a list of which one line has none."""
    text = (REQUIREMENTS / name).read_text()
    entries = re.split(r"\n(?=\S)", text.strip())[1:]
    assert len(entries) > 20
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.parametrize("name", [name for name, lock in LOCKS.items() if lock.constraints])
def test_versions_are_those_of_the_tests(name: str) -> None:
    lock = LOCKS[name]
    held = pins(ROOT / lock.constraints)
    different = {
        package: (version, held[package])
        for package, version in pins(REQUIREMENTS / name).items()
        if package in held and package not in lock.without and held[package] != version
    }
    if lock.cpu:
        assert different.pop("torch") == ("2.13.0+cpu", "2.13.0")
    assert different == {}, "run `make locks`"


@pytest.mark.parametrize("name", [name for name, lock in LOCKS.items() if lock.constraints])
def test_what_pyproject_asks_for_is_in_the_list(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in LOCKS[name].extras:
        asked += project["optional-dependencies"][extra]
    locked = pins(REQUIREMENTS / name)
    for each in map(Requirement, asked):
        version = locked.get(canonicalize_name(each.name))
        assert version is not None, f"{each.name} is missing: run `make locks`"
        assert each.specifier.contains(version), f"{each} is locked at {version}: run `make locks`"


def test_the_cpus_list_has_nothing_for_gpus() -> None:
    names = pins(REQUIREMENTS / "cpu.txt")
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
