"""What goes wrong with checkpoints, and which faults pass by themselves."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

ATTEMPTS, FIRST_WAIT_S = 3, 1.0

# A network file system that stumbles; a full or read-only disk does not get better by waiting.
_TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT,
    errno.ECONNRESET, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO,
}  # fmt: skip

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used as asked."""


def save_error(target: Path, cause: object) -> CheckpointError:
    """The message of every failed save."""
    return CheckpointError(
        f"could not save the checkpoint {target}: {cause}. Earlier checkpoints are intact; "
        "free some space or set output_dir to another disk, then resume with ckpt_path=last"
    )


def operating_system_error(error: BaseException) -> OSError | None:
    """The operating system's error below what a library made of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def retrying(operation: Callable[[], T]) -> T:
    """Run `operation`, which must be repeatable, up to three times while its fault is transient.

    Raises:
        the last error of `operation`, unchanged.
    """

    def transient(error: BaseException) -> bool:
        cause = operating_system_error(error)
        return cause is not None and cause.errno in _TRANSIENT

    return Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_WAIT_S),
        retry=retry_if_exception(transient),
        reraise=True,
    )(operation)
