"""Reads that fail for a moment, as network file systems do, are tried again."""

from __future__ import annotations

import errno
import logging

from tenacity import (
    before_sleep_log,
    retry,
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
ATTEMPTS = 5


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


# Waits of about 0.5, 1, 2 and 4 s between five attempts; the last error is raised as it is.
retry_transient = retry(
    retry=retry_if_exception(is_transient),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential_jitter(multiplier=0.5, max=30, jitter=0.25),
    before_sleep=before_sleep_log(logging.getLogger(__name__), logging.WARNING),
    reraise=True,
)
