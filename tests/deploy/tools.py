"""Where the programs of `make infra-env` and of Debian are, for the tests of deploy/."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / os.environ.get("INFRA", ".venv-infra")


def tool(name: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    found = shutil.which(name, path=f"{INFRA / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed (make infra-env, .ci/packages)")
    return found


def compose() -> str:
    """Docker's compose: the program itself, as the script of its package hides its exit code."""
    found = list(INFRA.glob("lib/python3*/site-packages/compose/docker-compose"))
    if not found:
        pytest.skip("docker-compose is not installed (make infra-env)")
    return str(found[0])
