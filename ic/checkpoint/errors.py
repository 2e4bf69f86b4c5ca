"""What goes wrong with checkpoints, and which faults pass by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from ic.files.retry_io import is_transient

ATTEMPTS, FIRST_WAIT_S = 3, 1.0

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used as asked."""


def save_error(target: Path, cause: object) -> CheckpointError:
    """The message of every failed save."""
    return CheckpointError(
        f"could not save the checkpoint {target}: {cause}. Earlier checkpoints are intact; "
        "free some space or set output_dir to another disk, then resume with ckpt_path=last"
    )


def retrying(operation: Callable[[], T]) -> T:
    """Run `operation`, which must be repeatable, up to three times while its fault is transient.

    Raises:
        the last error of `operation`, unchanged.
    """

    return Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_WAIT_S),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )(operation)
