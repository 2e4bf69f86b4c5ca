"""`fit` on several hosts that torchrun connects, as docs/parallel.md says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import SHORT, host_store

ROOT = Path(__file__).resolve().parents[2]
# Read by every interpreter at its start; what is registered first is called last.
AT_THE_END = """
import atexit
from pathlib import Path

@atexit.register
def tell():
    threads = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            threads.append(file.read_text())
        except OSError:
            pass  # one that has ended by now
    print("threads of gloo at the end:", sum("gloo" in name for name in threads), flush=True)
"""


@pytest.mark.slow
def test_two_hosts_train_together(tmp_path: Path) -> None:
    """Two launchers that know only where to meet, each with a process of its own.

    A thread of gloo's that outlives the Python of its process can abort it (exit code 134).
    """
    (tmp_path / "sitecustomize.py").write_text(AT_THE_END)
    meeting = host_store()  # kept open here: a port that a launcher opens could be taken by then
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-id=ic", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{meeting.port}"),
        *("--rdzv-conf=is_host=false", "--local-addr=localhost", "-m", "ic"),
    ]
    short = (
        *("strategy=fsdp2", "trainer.num_nodes=2", "trainer.devices=1", "trainer.accelerator=cpu"),
        *("trainer.max_steps=1", "logger=none", "callbacks.passkey=null", "callbacks.memory=null"),
    )
    hosts = [
        subprocess.Popen(
            [*torchrun, *SHORT, *short, f"output_dir={tmp_path}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )
        for _ in range(2)
    ]
    printed = [host.communicate()[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], printed
    together = "".join(printed)
    counts = re.findall(r"threads of gloo at the end: (\d+)", together)
    assert counts == ["0"] * 4  # two launchers, two processes
    assert "GLOBAL_RANK: 0, MEMBER: 1/2" in together
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in together
    assert together.count("checkpoint: ") == 1  # one process speaks for all
    run = tmp_path / "debug/default"
    shards = sorted(file.name for file in (run / "checkpoints/last").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["num_nodes"] == 2
