"""vLLM's engine ends when the server that began it was killed.

vLLM's workers watch their engine. Its engine does not watch its server: after a `kill -9` of the
server, or when the system killed it for want of memory, the engine and its workers stay, and so
does what they hold (seen with 0.32.0).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import cache
from multiprocessing.process import BaseProcess

# What vLLM calls the process of an engine, with a number behind it where there are several.
_ENGINE = "EngineCore"


@cache  # vLLM calls its plugins more than once
def end_with_server() -> None:
    """In the process of an engine: ask it to end once the process that began it has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith(_ENGINE):
        threading.Thread(target=_watch, args=(parent,), name="orphans", daemon=True).start()


def _watch(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
