"""Too little memory on the host is one line, wherever it runs out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SHORT

ROOT = Path(__file__).resolve().parents[1]
# The limit is set once what the process has is known, so that the loader, whose libraries may end
# the process at once, has what it needs.
_CHILD = """
import re, resource, sys
from pathlib import Path
import ic.cli
{imports}
now_kib = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
limit = now_kib * 1024 + {spare_bytes}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ic.cli.main(sys.argv[1:])
"""


def limited(spare_mib: int, *args: str, imports: str = "") -> tuple[int, str]:
    """A command line whose process may take so much more memory -> exit code, stderr."""
    child = _CHILD.format(imports=imports, spare_bytes=spare_mib * 2**20)
    done = subprocess.run(
        [sys.executable, "-c", child, *args], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
@pytest.mark.parametrize(
    ("spare_mib", "override", "imports", "said"),
    [
        # The model's three matrices of 800 MB per layer, in 1 GiB.
        (1024, "model.intermediate_size=1048576", "import ic.run.train", "can't allocate memory"),
        # libtorch does not fit.
        (32, "seed=1", "", "failed to map segment"),
    ],
)
def test_too_little_memory_is_one_line(
    tmp_path: Path, spare_mib: int, override: str, imports: str, said: str
) -> None:
    code, stderr = limited(spare_mib, *SHORT, override, f"output_dir={tmp_path}", imports=imports)
    assert code == 1, stderr
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("ic: not enough host memory: ")
    assert said in last
    assert last.endswith("raise what limits it: `ulimit -v`, the container's limit, SLURM's --mem")
