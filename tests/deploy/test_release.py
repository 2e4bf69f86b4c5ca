"""What a release needs of the sources: versions that agree and a changelog that tells of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = """# Changelog

## 1.3.0 (unreleased)
- Something new.

## 1.2.0 (2026-11-30)
- One thing.
- Another, of two
  lines.

## 1.1.0 (2026-01-02)
- Old.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release", tmp_path / ".ci/release")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    chart = tmp_path / "deploy/kubernetes/x"
    chart.mkdir(parents=True)
    (chart / "Chart.yaml").write_text("name: x\nversion: 1.2.0\nappVersion: '1.2.0'\n")
    return tmp_path


def release(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, project / ".ci/release", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_notes_are_the_section_of_the_version(project: Path) -> None:
    done = release(project, "notes", "v1.2.0")
    assert (done.returncode, done.stdout) == (0, "- One thing.\n- Another, of two\n  lines.\n")


def test_a_tag_that_fits(project: Path) -> None:
    done = release(project, "check", "v1.2.0")
    assert done.returncode == 0
    assert done.stdout == "v1.2.0: 3 files agree, and the changelog tells of it\n"


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("1.2.0", ["'1.2.0' is no tag of a release; write vMAJOR.MINOR.PATCH, such as v1.2.0"]),
        ("v1.2.0rc1", ["'v1.2.0rc1' is no tag of a release"]),
        (
            "v1.3.0",
            [
                "pyproject.toml is 1.2.0, the tag is v1.3.0",
                "deploy/kubernetes/x/Chart.yaml version is 1.2.0",
                "deploy/kubernetes/x/Chart.yaml appVersion is 1.2.0",
                "CHANGELOG.md says that 1.3.0 is unreleased",
            ],
        ),
        (
            "v1.4.0",
            ["1.2.0", "1.2.0", "1.2.0", "CHANGELOG.md has no heading '## 1.4.0 (YYYY-MM-DD)'"],
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "notes"])
def test_a_tag_that_does_not_fit(project: Path, command: str, tag: str, said: list[str]) -> None:
    """One line for each fault, exit code 2, and no notes."""
    done = release(project, command, tag)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == len(said)
    for line, words in zip(lines, said, strict=True):
        assert line.startswith(".ci/release: ")
        assert words in line


def test_a_chart_of_another_version(project: Path) -> None:
    (project / "deploy/kubernetes/x/Chart.yaml").write_text("name: x\nversion: 1.1.9\n")
    done = release(project, "check", "v1.2.0")
    assert done.returncode == 2
    assert "x/Chart.yaml version is 1.1.9" in done.stderr
    assert "x/Chart.yaml appVersion is none" in done.stderr


def test_an_empty_section(project: Path) -> None:
    (project / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.2.0 (2026-11-30)\n\n## 1.1.0 (2026-01-02)\n- x\n"
    )
    assert "CHANGELOG.md says nothing of 1.2.0" in release(project, "check", "v1.2.0").stderr


def test_this_project_could_be_released() -> None:
    """All but the date: the versions agree today, too, and the changelog has the heading."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = release(ROOT, "check", f"v{version}")
    undated = f".ci/release: CHANGELOG.md says that {version} is unreleased; write its date there\n"
    assert done.stderr in ("", undated)


def workflows() -> dict[str, str]:
    return {path.name: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}


def test_actions_are_pinned_and_rights_are_few() -> None:
    """Every action by its commit, one commit for each; no workflow has rights, jobs name their own."""
    commits: dict[str, str] = {}
    for name, text in workflows().items():
        for used in re.findall(r"uses: (\S+.*)", text):
            if used.startswith("./"):
                assert (ROOT / used).is_file()
                continue
            match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+", used)
            assert match, f"{name}: {used}"
            assert commits.setdefault(match[1], match[2]) == match[2], match[1]
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {}, name
        for job in workflow["jobs"].values():
            assert set(job["permissions"]) <= {"contents", "packages", "id-token"}
    writers = [name for name, text in workflows().items() if "contents: write" in text]
    assert writers == ["release.yml"]


def test_workflows_run_what_is_here() -> None:
    text = "\n".join(workflows().values())
    for path in (".ci/run", ".ci/release", "deploy/docker/Dockerfile"):
        assert path in text
        assert (ROOT / path).exists()
