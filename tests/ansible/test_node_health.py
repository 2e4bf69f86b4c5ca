"""The health check of a SLURM node, with an `nvidia-smi`, `scontrol` and devices that a test makes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ansible/roles/slurm/files/node_health"


class Node:
    """A folder of devices and programs; `drained` is the reason that SLURM was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dev", "bin", "etc", "spool"):
            (folder / name).mkdir()
        for gpu in range(2):
            (folder / "dev" / f"nvidia{gpu}").touch()
        (folder / "dev" / "nvidiactl").touch()
        shutil.copy(SCRIPT, folder / "etc" / "node_health")
        for name in ("prolog", "epilog", "health_check"):
            (folder / "etc" / name).symlink_to("node_health")
        self.settings()
        self.program("smi", 'echo "0, 0"; echo "1, [N/A]"')
        self.program("logger", "true")
        self.state("IDLE")

    def settings(self, smi: str = "yes", min_free_mb: int = 1, folder: str = "spool") -> None:
        (self.folder / "etc" / "node_health.conf").write_text(
            f"devices={self.folder}/dev\ngpus=2\nnvidia_smi={smi}\n"
            f"folders=({self.folder}/{folder})\nmin_free_mb={min_free_mb}\n"
            # The script puts the system's folders first; these are what the test stands in for.
            f"PATH={self.folder}/bin:$PATH\n"
        )

    def program(self, name: str, script: str) -> None:
        path = self.folder / "bin" / ("nvidia-smi" if name == "smi" else name)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def state(self, state: str) -> None:
        self.program(
            "scontrol",
            f'if [[ $1 == show ]]; then echo "NodeName=n State={state} x=1"; else\n'
            f'printf "%s\\n" "$@" >> {self.folder}/told; fi',
        )

    def run(self, role: str, **environment: str) -> tuple[int, str]:
        """-> exit code, and the reason that SLURM was told, or an empty string."""
        done = subprocess.run(
            [str(self.folder / "etc" / role)],
            env={**os.environ, "SLURMD_NODENAME": "n", **environment},
            capture_output=True,
            text=True,
        )
        told = self.folder / "told"
        lines = told.read_text().splitlines() if told.exists() else []
        told.unlink(missing_ok=True)
        if lines:
            assert lines[:3] == ["update", "nodename=n", "state=drain"]
        reason = lines[3].removeprefix("reason=node_health: ") if lines else ""
        if reason:
            assert f"node_health: {reason}" in done.stderr
        return done.returncode, reason


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize("role", ["prolog", "epilog", "health_check"])
def test_a_node_that_is_fit(node: Node, role: str) -> None:
    assert node.run(role) == (0, "")
    node.settings(smi="no")
    node.program("smi", "exit 9")
    assert node.run(role) == (0, ""), "it asked where there is nothing to ask"


@pytest.mark.parametrize(
    ("smi", "reason"),
    [
        ('echo "0, 0"', "1 of 2 GPUs answer nvidia-smi"),
        ('echo "0, 0"; echo "1, 3"', "GPU 1 has 3 uncorrectable memory errors"),
        ("echo GPU is lost; exit 15", "nvidia-smi fails: GPU is lost"),
    ],
)
def test_gpus_that_are_unfit(node: Node, smi: str, reason: str) -> None:
    node.program("smi", smi)
    assert node.run("prolog") == (1, reason)


def test_a_lost_device(node: Node) -> None:
    (node.folder / "dev" / "nvidia1").unlink()
    assert node.run("health_check") == (1, f"1 of 2 GPUs in {node.folder}/dev")


def test_folders_that_are_unfit(node: Node) -> None:
    node.settings(folder="nowhere")
    assert node.run("prolog") == (1, f"{node.folder}/nowhere cannot be written")
    node.settings(min_free_mb=10**9)
    code, reason = node.run("prolog")
    assert code == 1
    assert reason.startswith(f"{node.folder}/spool has ")
    assert reason.endswith(f" MB free, less than {10**9}")
    assert not list((node.folder / "spool").iterdir()), "it left its own file"


def test_a_reason_that_is_there_already_stays(node: Node) -> None:
    (node.folder / "dev" / "nvidia1").unlink()
    node.state("IDLE+DRAIN")
    assert node.run("prolog") == (1, "")


def test_what_a_job_left_on_its_gpus_is_killed(node: Node) -> None:
    with subprocess.Popen(["sleep", "infinity"]) as left:
        node.program(
            "smi",
            "if [[ $* == *--id=1* ]]; then if [[ $(ps -o stat= -p "
            f"{left.pid}) != Z* ]]; then echo {left.pid}; fi\n"
            'else echo "0, 0"; echo "1, 0"; fi',
        )
        assert node.run("prolog", SLURM_JOB_GPUS="1") == (0, "")
        assert left.poll() is None, "only an epilog kills"
        assert node.run("epilog", SLURM_JOB_GPUS="1") == (0, "")
        assert left.wait() == -9
