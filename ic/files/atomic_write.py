"""Result files that are complete or absent: written under a temporary name, then renamed.

A heatmap viewer, a dashboard or the next job may read a run directory at any moment, and a run may
be killed while it writes. `os.replace` is atomic within a file system, so a reader sees the old
file or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; rename it to `path` at the end, unless an error comes.

    Raises:
        OSError: of the operating system, with the name of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two ranks that share a folder from writing into each other's file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise named(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which `write` does not know."""
    if error.filename is None or Path(error.filename).name.endswith(".tmp"):
        error.filename = str(path)
    return error


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` as indented JSON. NaN and infinity raise ValueError: they are not JSON."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(payload, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
