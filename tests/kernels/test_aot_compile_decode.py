"""The decode kernels compile for every chip we name, fit its shared memory and spill nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
CAPABILITIES = [80, 86, 89, 90, 100]
# What spills, with Triton 3.9: a shape without a published figure, and two registers of what has one
# in pages.
STACK_BYTES = {"512 rows 64, page 16": 280, "many heads fp8 {'page_size': None, 'num_query': 4}": 8}


def compile_all(capability: int) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot_decode.py")), str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.compile
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shape_compiles(capability: int) -> None:
    rows = compile_all(capability)
    assert rows
    for row in rows.values():
        assert row["shared_bytes"] <= row["shared_limit_bytes"], row
        if row["published"]:
            assert row["stack_bytes"] <= STACK_BYTES.get(row["name"], 0), row
    if capability == 90:
        assert rows["decode 192+64 rows 16 bf16"]["wgmma"] > 0
        # Scores in 36 steps of 16 columns; values in 4 of 16 tokens, for 2 times 256 columns.
        assert rows["decode 512+64 rows 64 bf16"]["wgmma"] == 44
        assert rows["decode 512+64 rows 32 bf16"]["wgmma"] == 44
        # A warpgroup for 64 rows; scores of the first tile and of the others, 16 products each, and
        # values of the others and of the last, 4 products each of 128 and of 64 columns.
        assert rows["decode 192+64 rows 128 bf16"]["wgmma"] == 2 * (2 * 16 + 2 * 8)
        assert rows["decode 192+64 rows 64 bf16"]["wgmma"] == 2 * 16 + 2 * 8
        assert rows["decode 192+64 rows 32 bf16"]["wgmma"] == 2 * 16 + 2 * 8
        # Scores in 36 steps of 16 columns; values in 4 of 16 tokens, for 4 times 128 columns.
        assert rows["decode 512+64 rows 64 fp8"]["wgmma"] == 52
        assert rows["decode 512+64 rows 64 i8"]["wgmma"] == 52
        # Scores alone: one product for every 32 of 256 and of 576 columns.
        assert rows["decode 192+64 rows 16 fp8"]["wgmma"] == 8
        assert rows["decode 512+64 rows 16 fp8"]["wgmma"] == 18
