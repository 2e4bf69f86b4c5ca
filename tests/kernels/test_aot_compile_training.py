"""Every training kernel compiles for every chip, within its shared memory and registers, without a
GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = [(c, "elementwise") for c in (75, 80, 86, 89, 90, 100)]
JOBS += [(c, "attention") for c in (80, 86, 89, 90, 100)] + [(90, "hopper")]
# ptxas keeps up to this many bytes around the partition loop of this kernel, outside every inner
# loop.
ALLOWED_STACK_BYTES = {"hopper_backward_kv_kernel": 24}


@pytest.mark.compile
@pytest.mark.parametrize(("capability", "kernel"), JOBS)
def test_compiles_within_the_chip(capability: int, kernel: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "aot_training.py"), str(capability),
        kernel],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results
    for result in results:
        assert result["shared"] <= result["limit"], result
        assert result["stack"] <= ALLOWED_STACK_BYTES.get(result["kernel"], 0), result
