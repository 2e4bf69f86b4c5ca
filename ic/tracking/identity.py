"""Which run of a tracker a run of ours is: the same across requeues, another after `overwrite`."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import asdict, dataclass

from ic.files.atomic_write import write_json
from ic.files.results import read_json
from ic.files.run_folder import RunFolder

_FILE = "run.json"


@dataclass(frozen=True)
class Identity:
    """What trackers know a run by.

    Attributes:
        key: of this run among all that ever had its name; in the tags of its MLflow run.
        wandb_id: of its W&B run.
    """

    key: str
    wandb_id: str

    def keep(self, folder: RunFolder) -> None:
        """Write it into a run's folder; what another run there left for trackers is removed."""
        if saved_identity(folder) != self:
            shutil.rmtree(folder.tracking, ignore_errors=True)
            write_json(folder.tracking / _FILE, asdict(self))


def saved_identity(folder: RunFolder) -> Identity | None:
    """The identity that a run's folder holds, if it has one."""
    saved = read_json(folder.tracking / _FILE)
    return Identity(**saved) if saved else None


def identify(folder: RunFolder, name: str, run_id: str, goes_on: bool) -> Identity:
    """The identity of the run that the folder holds, or a new one; nothing is written.

    Args:
        goes_on: whether this is the run that the folder holds, and not one that begins anew.
    """
    if goes_on and (saved := saved_identity(folder)):
        return saved
    key = secrets.token_hex(4)
    # W&B refuses commas, which a sweep's jobs have in theirs.
    wandb_id = f"{name}-{run_id}".replace(",", "-")
    return Identity(key, f"{wandb_id}-{key}")
