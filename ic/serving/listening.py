"""The socket of a server."""

from __future__ import annotations

import socket

from ic.errors import UsageError

# Connections that wait to be taken.
BACKLOG = 2048
# What a connection may hold for a client that does not read, beside asyncio's own 64 KiB.
_SEND_BUFFER_BYTES = 128 * 1024


def check_address(host: str, port: int) -> None:
    """Refuse an address that a server could not have. No client can connect meanwhile: one whose
    connection waits when a socket is closed is told that it was reset.

    Raises:
        UsageError: as `listen`.
    """
    _bind(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds an address. Who connects waits until the server is ready.

    Raises:
        UsageError: the address is taken, or none of this machine's.
    """
    found = _bind(host, port)
    try:
        found.listen(BACKLOG)
    except OSError as error:  # another took it after it was bound
        found.close()
        raise _refusal(host, port, error) from None
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return found


def _bind(host: str, port: int) -> socket.socket:
    found: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        # Connections of a server that was killed may still be remembered at its address.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        if found is not None:
            found.close()
        raise _refusal(host, port, error) from None
    return found


def _refusal(host: str, port: int, error: Exception) -> UsageError:
    why = getattr(error, "strerror", None) or error
    return UsageError(
        f"cannot listen on host={host} port={port} ({why}); choose another port or host, or "
        "end what uses this one"
    )


def url_of(listening: socket.socket) -> str:
    """Under which clients find OpenAI's routes on a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
