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

# What NFS, Lustre and object-store mounts answer while a server fails over.
TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
ATTEMPTS = 5


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: an OSError with one of the codes in `TRANSIENT`."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


# Waits of about 0.5, 1, 2 and 4 s between five attempts; the last error is raised as it is.
retry_transient = retry(
    retry=retry_if_exception(is_transient),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential_jitter(initial=0.5, max=30, jitter=0.25),
    before_sleep=before_sleep_log(logging.getLogger(__name__), logging.WARNING),
    reraise=True,
)
