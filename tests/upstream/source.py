"""transformers' own test classes, from the source distribution of exactly the installed version.

The wheel carries no tests. The source distribution, which pip downloads from the package index,
carries those at the top of the folder `tests`: the common classes for models, tokenizers and
training. `python tests/upstream/source.py` fetches them into a folder that git ignores.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# The folder's name as a package, so that the relative imports between its files work.
PACKAGE = "transformers_tests"
FOLDER = Path(__file__).resolve().parents[2] / "build" / "upstream" / version("transformers")


def is_there() -> bool:
    """Whether the tests of the installed version lie in `FOLDER`."""
    return (FOLDER / PACKAGE / "test_modeling_common.py").exists()


def fetch() -> None:
    """Download them, unless they are there.

    Raises:
        OSError: the index cannot be reached, or has no source distribution with tests.
    """
    if is_there():
        return
    wanted = f"transformers=={version('transformers')}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "transformers", "--dest", temporary, wanted]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if result.returncode or not archives:
            reason = (result.stderr.strip() or "no archive").splitlines()[-1]
            raise OSError(f"pip download {wanted}: {reason}")
        package = Path(temporary) / PACKAGE
        package.mkdir()
        (package / "__init__.py").touch()
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                parts = Path(member.name).parts
                if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    (package / parts[2]).write_bytes(content.read())
        if not (package / "test_modeling_common.py").exists():
            raise OSError(f"the source distribution of {wanted} carries no tests")
        package.rename(FOLDER / PACKAGE)


if __name__ == "__main__":
    try:
        fetch()
    except OSError as error:
        print(f"transformers' own tests cannot be had, and will be skipped: {error}")
