"""The socket of a server."""

from __future__ import annotations

import socket

from ic.errors import UsageError

# Connections that wait to be taken.
BACKLOG = 2048
# What a connection may hold for a client that does not read, beside asyncio's own 64 KiB.
_SEND_BUFFER_BYTES = 128 * 1024


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds an address. Who connects waits until the server is ready.

    Raises:
        UsageError: the address is taken, or none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on host={host} port={port} ({why}); choose another port or host, or "
            "end what uses this one"
        ) from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return found


def url_of(listening: socket.socket) -> str:
    """Under which clients find OpenAI's routes on a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
