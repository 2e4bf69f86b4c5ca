"""The port at which the processes of a host meet."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20000
_FEWEST = 1000  # ports to choose from, should the range begin lower


def choose_port() -> None:
    """Set `MASTER_PORT` unless a launcher has.

    Lightning takes a free port of the range from which the system gives ports to any connection,
    and listens only seconds later, when another process may have it. This one lies below.
    """
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A port that nobody listens at, below the range of ephemeral ports.

    Raises:
        ValueError: there is none.
    """
    end = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.is_file() else 32768
    candidates = list(range(min(_LOWEST, end - _FEWEST), end))
    random.SystemRandom().shuffle(candidates)  # not the seeded generator: runs begin alike
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ValueError(f"no free port from {min(candidates)} to {max(candidates)}; set MASTER_PORT")
