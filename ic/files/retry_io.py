"""What fails for a moment, as network file systems do, is tried again: one policy for all."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

# What NFS, Lustre and object-store mounts answer while a server fails over; a full or read-only
# disk does not get better by waiting.
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
    }
)
# Waits of 0.5, 1, 2 and 4 s, 8 s with the jitter: longer than the 3 s for which an NFS client
# believes a stale attribute and than a server's pause under load, shorter than anything that waits
# for this rank (a collective's limit is minutes). A failover takes longer still, but there the
# client itself blocks. The jitter keeps the ranks that failed together from asking together again.
ATTEMPTS, FIRST_WAIT_S, JITTER_S = 5, 0.5, 0.25

T = TypeVar("T")


def operating_system_error(error: BaseException) -> OSError | None:
    """The operating system's error below what a library made of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: at the bottom an OSError with a code in `TRANSIENT`."""
    cause = operating_system_error(error)
    return cause is not None and cause.errno in TRANSIENT


def retrying(operation: Callable[[], T]) -> T:
    """Run `operation`, which must be repeatable, up to `ATTEMPTS` times while its fault is
    transient; each new attempt is a warning in the log.

    Raises:
        Exception: the last error of `operation`, unchanged.
    """
    return Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(multiplier=FIRST_WAIT_S, jitter=JITTER_S),
        before_sleep=before_sleep_log(logging.getLogger(__name__), logging.WARNING),
        reraise=True,
    )(operation)
