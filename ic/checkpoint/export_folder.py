"""The folder that an export may take, checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from ic.checkpoint.card.files import CARD, is_edited
from ic.checkpoint.commit import clear_partial
from ic.checkpoint.errors import CheckpointError

# Lists what an export wrote, so that nothing else is ever deleted with it.
MANIFEST = "export.json"


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Refuse a folder that is there, or that an export would take with more than an export in it.

    What an export that was killed left beside it is put right first.

    Args:
        source: the checkpoint that is exported.
        overwrite: an empty folder, or an export and nothing else, may be replaced.

    Raises:
        CheckpointError: `output` holds the checkpoint or something else, or is there at all.
    """
    clear_partial(output.absolute())
    if not output.exists():
        return
    if source.resolve().is_relative_to(output.resolve()):
        same = output.resolve() == source.resolve()
        raise CheckpointError(
            f"output={output} {'is' if same else 'holds'} the checkpoint: choose another folder"
        )
    if not overwrite:
        raise CheckpointError(
            f"output={output} exists: choose another folder, or replace an export with "
            "overwrite=true"
        )
    _check_replaceable(output)


def _check_replaceable(output: Path) -> None:
    """Raises CheckpointError unless a folder is empty, or holds what an export wrote, as it was
    written, and nothing else.
    """
    if output.is_symlink() or not output.is_dir():
        kind = "a link" if output.is_symlink() else "a file"
        raise CheckpointError(f"output={output} is {kind}: overwrite=true replaces folders alone")
    found = {path.name for path in output.iterdir()}
    if not found:
        return
    try:
        written = {*json.loads((output / MANIFEST).read_text())["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"output={output} is no export (it holds no {MANIFEST} of one), and overwrite=true "
            "replaces exports alone: choose another folder, or remove it yourself"
        ) from None
    if others := sorted(found - written):
        raise CheckpointError(
            f"output={output} holds more than an export, such as {others[0]}, and overwrite=true "
            "would delete it: choose another folder, or move it away"
        )
    if is_edited(output):
        raise CheckpointError(
            f"output={output}: its {CARD} was edited since it was written, and overwrite=true "
            "would replace it: move it away, or choose another folder"
        )
