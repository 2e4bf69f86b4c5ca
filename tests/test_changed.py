"""The rule for CI's long parts: they run when what they depend on has changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = "@pytest.mark." + "slow"  # apart, so that this file does not have it


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of a few files whose targets count their runs."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "changed", tmp_path / ".ci" / "changed")
    for name in ("kernels/a.py", "kernels/benchmarks/b.py", "constraints.txt", "other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    (tmp_path / "Makefile").write_text(
        "compile:  ## x\n\t@echo run >> runs\n\t@echo 3 passed in 1s\n"
    )
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def changed(project: Path, target: str = "compile", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, project / ".ci" / "changed", target],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def runs(project: Path) -> int:
    return len((project / "runs").read_text().splitlines())


def test_it_runs_once_until_an_input_changes(project: Path) -> None:
    changed(project)
    record = json.loads((project / ".ci/passed/compile.json").read_text())
    assert record["passed"] == 3
    assert record["versions"]["torch"]
    assert "no input has changed" in changed(project)
    (project / "other.py").write_text("2\n")
    (project / "kernels/benchmarks/b.py").write_text("2\n")  # what times the kernels
    (project / "runs.txt").write_text("")
    changed(project)
    assert runs(project) == 1
    for index, name in enumerate(("kernels/a.py", "constraints.txt", "Makefile")):
        with (project / name).open("a") as file:
            file.write("\t@true\n" if name == "Makefile" else "# 2\n")
        changed(project)
        changed(project)
        assert runs(project) == 2 + index, name
    (project / "kernels/new.py").write_text("")
    changed(project)
    assert runs(project) == 5
    changed(project, RUN_ALL="1")
    assert runs(project) == 6


def test_tests_of_a_marker_are_inputs_with_what_they_import(project: Path) -> None:
    rule = "slow:  ## x\n\t@echo run >> runs\n\t@echo 1 passed in 1s\n"
    (project / "Makefile").write_text(rule)
    texts = {
        "tests/conftest.py": "",
        "tests/run/conftest.py": "",
        "tests/run/test_long.py": f"from tests.run import whole\n{SLOW}\n",
        "tests/run/whole.py": "import tests.parts.one as one\n",
        "tests/parts/one.py": "",
        "tests/run/test_short.py": "",
        "tests/other/conftest.py": "",
        "tests/other/test_hosts.py": f"pytestmark = [pytest.mark.hosts]\n{SLOW}\n",
    }
    elsewhere = ("tests/run/test_short.py", "tests/other/conftest.py", "tests/other/test_hosts.py")
    for name, text in texts.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    changed(project, "slow")
    expected = 1
    for name in texts:
        with (project / name).open("a") as file:
            file.write("# changed\n")
        changed(project, "slow")
        expected += name not in elsewhere
        assert runs(project) == expected, name


def test_settings_of_linters_are_no_input(project: Path) -> None:
    """Nor what a marker means; versions and other settings of the tests are."""
    settings = project / "pyproject.toml"
    texts = (
        "[tool.pytest.ini_options]\nmarkers = ['slow: long']\n",
        "[tool.pytest.ini_options]\nmarkers = ['slow: longer']\n[tool.ruff]\nselect = ['E']\n",
        "[tool.pytest.ini_options]\nmarkers = ['short: longer']\n",
        "[tool.pytest.ini_options]\ntimeout = 3\n",
        "[project]\ndependencies = ['torch']\n",
    )
    counts = []
    (project / "Makefile").write_text("router:\n\t@echo run >> runs\n\t@echo 1 passed in 1s\n")
    for text in texts:
        settings.write_text(text)
        changed(project, "router")
        counts.append(runs(project))
    assert counts == [1, 1, 2, 3, 4]


def test_a_target_that_runs_no_test_has_not_passed(project: Path) -> None:
    (project / "Makefile").write_text("compile:\n\t@echo 'nothing to be done'\n")
    done = subprocess.run(
        [sys.executable, project / ".ci" / "changed", "compile"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "make compile ran no test" in done.stdout
    assert not (project / ".ci/passed").exists()


def test_no_folder_stands_for_a_target() -> None:
    """`make kernels` would find the folder kernels/ up to date."""
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)[0].split())
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    assert targets == phony


def test_a_failure_is_not_recorded(project: Path) -> None:
    (project / "Makefile").write_text("compile:\n\t@echo run >> runs; false\n")
    for count in (1, 2):
        done = subprocess.run([sys.executable, project / ".ci" / "changed", "compile"])
        assert done.returncode
        assert runs(project) == count
    assert not (project / ".ci/passed").exists()


def test_every_pattern_names_a_file() -> None:
    code = {"__name__": "changed", "__file__": str(ROOT / ".ci" / "changed")}
    exec((ROOT / ".ci" / "changed").read_text(), code)
    for target, patterns in code["INPUTS"].items():
        for pattern in patterns:
            listed = subprocess.run(
                ["git", "ls-files", pattern], cwd=ROOT, check=True, capture_output=True
            )
            assert listed.stdout, f"{target}: {pattern}"
        assert len(code["digest"](target)) == 64
