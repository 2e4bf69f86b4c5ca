"""One run of four ranks whose checkpoints several tests read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.checkpoint.ranks import run_ranks
from tests.conftest import SHORT

# Four context-parallel ranks see the batches that one process sees.
FIT = (
    *SHORT[1:],
    "trainer.limit_val_batches=0",  # or a run this short would be validated at its end
    "strategy=fsdp2",
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "callbacks.throughput=null",
    "callbacks.context_length=null",
    "optimizer.warmup_steps=2",
    "model.num_hidden_layers=2",
    "data.context_length=128",
    "trainer.max_steps=5",
    "trainer.val_check_interval=100",
)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run `four` that kept its two last steps of five, and every second. Read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share one run
        root = root.parent
    folder = root / "four"
    with FileLock(root / "four.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            codes, output = run_ranks(
                folder,
                4,
                *FIT,
                "run_id=four",
                "strategy.context_parallel_size=4",
                "callbacks.checkpoint.every_n_steps=1",
                "callbacks.checkpoint.keep_last=2",
                "callbacks.checkpoint.keep_every_n_steps=2",
            )
            assert codes == [0] * 4, output
            (folder / "done").touch()
    return folder
