"""Python and the packages against what the project asks for and what its CI runs."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ic.doctor.check import Finding

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "infinite-context"
# Optional to install, but these decide what runs on a GPU.
OPTIONAL = ("triton", "liger-kernel", "wandb", "mlflow-skinny")


def python_version() -> Iterator[Finding]:
    wanted, _ = requirements()
    found = platform.python_version()
    if found in SpecifierSet(wanted):
        yield Finding("python", "ok", found)
    else:
        yield Finding("python", "fail", found, f"use Python {wanted}")


def package_versions() -> Iterator[Finding]:
    """Required and, where installed, optional packages."""
    pins = tested_versions()
    for requirement in requirements()[1]:
        yield from package_version(requirement, pins.get(requirement.name))


def package_version(requirement: Requirement, tested: str | None) -> Iterator[Finding]:
    """One package against a requirement and the version that CI runs."""
    name, wanted = requirement.name, str(requirement.specifier)
    install = f"pip install -c constraints.txt '{requirement}'"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name not in OPTIONAL:
            yield Finding(name, "fail", "not installed", install)
        return
    if not requirement.specifier.contains(found, prereleases=True):
        yield Finding(name, "fail", f"{found}, needs {wanted}", install)
    elif tested is not None and found.partition("+")[0] != tested:
        yield Finding(name, "warn", f"{found}, tested with {tested}", install)
    else:
        yield Finding(name, "ok", found)


def requirements() -> tuple[str, list[Requirement]]:
    """Python and packages of the checkout, or of the distribution where there is no checkout."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        python, required = project["requires-python"], project["dependencies"]
        extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    else:
        python = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
        lines = importlib.metadata.requires(DISTRIBUTION) or []
        required = [line for line in lines if "extra ==" not in line]
        extras = [line for line in lines if "extra ==" in line]
    optional = {r.name: r for r in map(Requirement, extras) if r.name in OPTIONAL}
    return python, [*map(Requirement, required), *optional.values()]


def tested_versions() -> dict[str, str]:
    """The pins of constraints.txt by package; empty where there is no checkout."""
    file = ROOT / "constraints.txt"
    if not file.is_file():
        return {}
    pairs = (line.partition("==") for line in file.read_text().splitlines())
    return {name: version for name, _, version in pairs}
