"""Where what can be made again is kept between runs, for the user who made it."""

from __future__ import annotations

import os
from pathlib import Path

AUTO = "auto"


def cache_folder(option: str | None, kind: str) -> Path | None:
    """The folder that an option for a cache stands for: a path, `auto`, or None for none.

    Args:
        kind: name of the folder below `~/.cache/infinite-context`, which `auto` is.
    """
    if option != AUTO:
        return None if option is None else Path(option)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "infinite-context" / kind
