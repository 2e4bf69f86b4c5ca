"""Runs that are killed at random events and resumed end as if nothing had happened.

IC_CHAOS_KILLS (40), IC_CHAOS_SEED (0) and IC_CHAOS_PROCESSES (1) set how many kills there are over
all kinds of runs, which, and how many runs of a kind go at once. `tests/chaos/campaign.py` does the
same from the command line, with a summary.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from tests.chaos.campaign import KINDS, run_campaign, summarize

KILLS = int(os.environ.get("IC_CHAOS_KILLS", "40"))
SEED = int(os.environ.get("IC_CHAOS_SEED", "0"))
PROCESSES = int(os.environ.get("IC_CHAOS_PROCESSES", "1"))
# Of ten kills; two ranks cost more than twice as much.
SHARES = {"one rank": 4, "one rank, dropout": 2, "two ranks, ddp": 2, "two ranks, fsdp2": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_one_that_was_not(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "c10d-NullHandler-dcp_logger")  # every step of every read
    num_kills = -(-KILLS * SHARES[kind] // 10)
    chains = run_campaign([kind], num_kills, SEED, tmp_path, PROCESSES)
    summary = summarize(chains)
    assert not summary["differences"], json.dumps(summary, indent=1)
    assert summary["kills"] >= num_kills
