"""Every training kernel compiles for every chip, within its shared memory and registers, without a
GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (
    ("192", "128", "False"),
    ("192", "128", "True"),
    ("128", "64", "False"),
    ("128", "64", "True"),
    ("96", "64", "True"),
)
JOBS = [(str(c), "elementwise") for c in (75, 80, 86, 89, 90, 100)]
JOBS += [(str(c), "attention", *widths) for c in (80, 86, 89, 90, 100) for widths in WIDTHS]
JOBS += [("90", "hopper", *widths) for widths in WIDTHS]
# ptxas keeps the thread's and the warp's number and a pointer here, around the partitions of a
# warp-specialised kernel.
STACK_BYTES_AROUND_PARTITIONS = 24
# One register of the masked steps, with documents; seen with Triton 3.6 only.
STACK_ACCESSES_IN_LOOPS = {("3.6", "hopper_backward_kv_kernel"): 5}


@pytest.mark.compile
@pytest.mark.parametrize("job", JOBS, ids="-".join)
def test_compiles_within_the_chip(job: tuple[str, ...]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "aot_training.py"), *job],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results
    triton = version("triton")[:3]
    for result in results:
        name = result["kernel"]
        partitions = name.startswith("hopper_")
        assert result["shared"] <= result["limit"], result
        assert result["stack"] <= (STACK_BYTES_AROUND_PARTITIONS if partitions else 0), result
        assert result["stack_in_loops"] <= STACK_ACCESSES_IN_LOOPS.get((triton, name), 0), result
