"""A wheel built from a clone works from an empty folder, without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FEW = (
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "evaluation.lengths=[512]",
    "evaluation.depths=[0.5]",
    "evaluation.samples=1",
    "evaluation.control_samples=0",
)


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment of its own; commands run in an empty folder."""

    interpreter: Path
    folder: Path

    def python(self, *args: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [self.interpreter, *args],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __call__(self, *args: str) -> str:
        """`python -m ic ...` -> what it printed."""
        return self.python("-m", "ic", *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def installed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("setuptools", minversion="77")
    tmp = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp / "clone")], **quiet)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp), str(tmp / "clone")]
    subprocess.run([*pip, *wheel], **quiet)
    venv.create(tmp / "venv", with_pip=False)
    python = Installed(tmp / "venv/bin/python", folder)
    site = Path(
        python.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    (wheel_file,) = tmp.glob("*.whl")
    install = ["install", "--no-deps", "--no-compile", "--target", str(site), str(wheel_file)]
    subprocess.run([*pip, *install], **quiet)
    # The dependencies, from here; the wheel's own folder comes first.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n" + _others())
    where = python.python("-c", "import ic; print(ic.__file__)").strip()
    assert Path(where).is_relative_to(site)
    return python


def _others() -> str:
    """Folders of packages that this Python sees beside its own."""
    seen = (Path(path) for path in sys.path if path.endswith("site-packages"))
    return "".join(f"{path}\n" for path in seen)


@pytest.mark.slow
def test_trains_and_evaluates(installed: Installed, folder: Path) -> None:
    assert "usage: python -m ic VERB" in installed()
    installed("fit", "experiment=mla_tiny", *FEW)
    run = folder / "runs/mla_tiny/default"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    results = json.loads((run / "results.json").read_text())
    assert {row["what"] for row in results["rows"]} == {"training", "memory", "passkey"}
    assert results["commit"] == "unknown"
    shown = installed("evaluate", f"run={run}", "accelerator=cpu")
    assert "passkey retrieval" in shown
    assert len(list(run.glob("evaluate/step=2/passkey/heatmap.png"))) == 1
    assert {path.name for path in folder.iterdir()} == {"runs"}


@pytest.mark.slow
def test_plans_and_examines_the_machine(installed: Installed) -> None:
    plan = json.loads(installed("plan", "experiment=mla_32k", "--json"))
    assert "mla_32k-fit.json" in plan["utilisation_source"]  # measurements that the wheel brings
    assert "free space" in installed("doctor")


@pytest.mark.slow
def test_brings_every_file_that_is_not_python(installed: Installed) -> None:
    program = "import ic, pathlib; print(pathlib.Path(ic.__file__).parent)"
    package = Path(installed.python("-c", program).strip())
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "ic", "conf", "callbacks", "datamodules", "kernels"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    data = [name for name in listed if name.endswith((".yaml", ".json", ".jsonl", "py.typed"))]
    assert len(data) > 50
    assert [name for name in data if not (package / name.removeprefix("ic/")).is_file()] == []
