"""`slurm/speedrun.sh` on a copy of the checkout with shrunken stages: results and tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_experiments import SHRINK

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "ic",
    "conf",
    "callbacks",
    "datamodules",
    "kernels",
    "slurm",
    "docs",
    "README.md",
    "pyproject.toml",
    "constraints.txt",
)


@pytest.mark.slow
def test_trains_the_ladder_evaluates_and_writes_the_tables(tmp_path: Path) -> None:
    for name in PARTS:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy(source, target)
    environment = {
        **os.environ,
        "IC_PYTHON": sys.executable,
        "SPEEDRUN_STAGES": "infinitecontext_1b mla_128k",
        "OMP_NUM_THREADS": "1",
        "IC_COMMIT": "speedrun",
    }
    done = subprocess.run(
        ["bash", "slurm/speedrun.sh", *SHRINK],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first = "infinitecontext_1b"
    for stage, start in ((first, None), ("mla_128k", f"runs/{first}/speedrun/checkpoints/last")):
        fit = json.loads((tmp_path / f"docs/results/{stage}-fit.json").read_text())
        assert fit["config"]["model"]["init_from"] == start
        passkey = json.loads((tmp_path / f"docs/results/{stage}-passkey.json").read_text())
        grid = passkey["config"]["evaluation"]
        assert [(row["task"], row["length_tokens"], row["n"]) for row in passkey["rows"]] == [
            (task, 256, len(grid["fillers"])) for task in sorted(grid["tasks"])
        ]
    page = (tmp_path / "docs/results.md").read_text()
    assert "| `mla_128k` | single | 256 | " in page
    assert "| speedrun |" in page
    assert "prompts of 256 tokens" in (tmp_path / "README.md").read_text()
