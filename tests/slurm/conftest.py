from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, reason_not_to_run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real SLURM with three nodes; skips where it cannot be had."""
    if (reason := reason_not_to_run()) is not None:
        pytest.skip(f"no SLURM: {reason}")
    running = Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3)
    try:
        try:
            running.start()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            pytest.skip(f"SLURM does not start here: {error}")
        yield running
    finally:
        running.stop()
