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


def start(capability: int, *extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("aot_decode.py")), str(capability), *extra],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit_bytes"], row
        if row["published"]:
            assert row["stack_bytes"] == 0, row


def test_published_shapes_compile_on_every_chip() -> None:
    processes = [start(capability, "--published") for capability in CAPABILITIES]
    results = {c: finish(p) for c, p in zip(CAPABILITIES, processes, strict=True)}
    for rows in results.values():
        check(rows)
    on_hopper = {row["name"]: row for row in results[90]}
    assert on_hopper["decode 192+64 rows 16 bf16"]["wgmma"] > 0
    assert on_hopper["decode 512+64 rows 64 bf16"]["wgmma"] > 0
    # Scores alone: one product for every 32 of 256 and of 576 columns.
    assert on_hopper["decode 192+64 rows 16 fp8"]["wgmma"] == 8
    assert on_hopper["decode 512+64 rows 16 fp8"]["wgmma"] == 18


@pytest.mark.compile
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shape_compiles(capability: int) -> None:
    check(finish(start(capability)))
