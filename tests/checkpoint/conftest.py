"""One run of four ranks whose checkpoints several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.ranks import run_ranks
from tests.conftest import SHORT

# Four context-parallel ranks see the batches that one process sees.
FIT = (
    *SHORT[1:], "strategy=fsdp2", "callbacks.passkey=null", "callbacks.memory=null",
    "callbacks.throughput=null", "callbacks.context_length=null", "optimizer.warmup_steps=2",
    "trainer.max_steps=7", "trainer.val_check_interval=100",
)  # fmt: skip


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run `four` that kept its two last steps of seven, and every third."""
    folder = tmp_path_factory.mktemp("four")
    codes, output = run_ranks(
        folder, 4, *FIT, "run_id=four", "strategy.context_parallel_size=4",
        "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=2",
        "callbacks.checkpoint.keep_every_n_steps=3",
    )  # fmt: skip
    assert codes == [0] * 4, output
    return folder
