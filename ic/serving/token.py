"""The token that clients must send, and where one is needed."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import string
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from ic.errors import UsageError

SHORTEST = 16  # characters; shorter ones can be guessed
_ALLOWED = frozenset(string.ascii_letters + string.digits + string.punctuation)


class Token:
    """A secret that is never shown: neither its text nor its digest is in its repr."""

    def __init__(self, text: str) -> None:
        self._digest = hashlib.sha256(text.encode()).digest()

    def matches(self, given: bytes) -> bool:
        """Whether this is the token, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(self._digest, hashlib.sha256(given).digest())


def read_token(
    variable: str, file: str | None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """The token of an environment variable or a file; None where neither names one.

    Raises:
        UsageError: both are given, or what they hold is no token; the message does not show it.
        OSError: the file cannot be read.
    """
    if file is None:
        text, where = environment.get(variable), f"the environment variable {variable}"
        if text is None:
            return None
    elif variable in environment:
        raise UsageError(
            f"token_file={file}: the environment variable {variable} holds a token, too; unset it, "
            "or leave token_file out"
        )
    else:
        text, where = Path(file).read_text(encoding="utf-8", errors="replace").strip(), file
    if len(text) < SHORTEST or not set(text) <= _ALLOWED:
        raise UsageError(
            f"{where} holds no token: give at least {SHORTEST} letters, digits or signs of ASCII, "
            "without a space; `openssl rand -hex 32` makes one"
        )
    return text


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        UsageError: the name is none of an address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"host={host}: no address of this name ({error}); give one of this machine's, such as "
            "127.0.0.1 or 0.0.0.0"
        ) from None
    return all(ip_address(address[4][0]).is_loopback for address in found)


def check_reach(host: str, token: str | None, variable: str) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        UsageError: that is what was asked for, or the host is not known.
    """
    if token is None and not is_loopback(host):
        raise UsageError(
            f"host={host} is reached from other machines, which needs a token: set the environment "
            f"variable {variable} or token_file, or listen on 127.0.0.1"
        )
