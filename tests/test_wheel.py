"""A wheel built from a clone works from an empty folder, without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
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
Installed = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def installed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Run `python -m ic ...` of the installed wheel in an empty folder -> what it printed."""
    pytest.importorskip("setuptools", minversion="77")
    tmp = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp / "clone")], **quiet)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp), str(tmp / "clone")]
    subprocess.run([*pip, *wheel], **quiet)
    venv.create(tmp / "venv", with_pip=False)
    python = tmp / "venv/bin/python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    (wheel_file,) = tmp.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel_file)], **quiet)
    # The dependencies, from here; the wheel's own folder comes first.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n" + _others())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*args: str) -> str:
        done = subprocess.run(
            [python, *args], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("-c", "import ic; print(ic.__file__)").strip()).is_relative_to(site)
    return lambda *args: run("-m", "ic", *args)


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
    assert plan["utilisation_source"] == "mla_32k-fit.json"  # measurements that the wheel brings
    assert "free space" in installed("doctor")


@pytest.mark.slow
def test_brings_bundled_conversations(installed: Installed) -> None:
    shown = installed("make_preferences", "output=pairs.jsonl", "samples=1", "depths=[0.5]")
    assert "1 pairs: pairs.jsonl" in shown
    fit = ("fit", "experiment=sft_tiny", "model.init_from=null", "callbacks.passkey=null")
    installed(*fit, "trainer.max_steps=1", "trainer.accelerator=cpu", "trainer.limit_val_batches=1")
