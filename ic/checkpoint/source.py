"""Where a model comes from, by what a user gives."""

from __future__ import annotations

from pathlib import Path


def shown_name(checkpoint: Path) -> str:
    """`mla_tiny, step 150` for `<name>/<run_id>/checkpoints/step=150`; else the folder's name."""
    folder = checkpoint.resolve()
    if folder.parent.name != "checkpoints" or not folder.name.startswith("step="):
        return folder.name
    return f"{folder.parents[2].name}, step {int(folder.name.removeprefix('step=')):,}"
