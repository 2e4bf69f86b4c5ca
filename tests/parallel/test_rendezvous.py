"""The port at which processes meet: free, below the ephemeral ones, and the launcher's if it has one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ic.parallel import rendezvous


def test_port_is_free_and_below_the_ephemeral_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # All but two ports are taken away, and one of the two is in use.
        span = tmp_path / "range"
        span.write_text(f"{port + 1}\t60999\n")
        monkeypatch.setattr(rendezvous, "_EPHEMERAL", span)
        monkeypatch.setattr(rendezvous, "_LOWEST", port - 1)
        monkeypatch.setattr(rendezvous, "_FEWEST", 2)
        assert rendezvous.free_port() == port - 1
        monkeypatch.setattr(rendezvous, "_FEWEST", 1)
        monkeypatch.setattr(rendezvous, "_LOWEST", port)
        with pytest.raises(
            ValueError, match=f"no free port from {port} to {port}; set MASTER_PORT"
        ):
            rendezvous.free_port()


def test_a_launchers_port_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "4711")
    rendezvous.choose_port()
    assert os.environ["MASTER_PORT"] == "4711"
    monkeypatch.delenv("MASTER_PORT")
    rendezvous.choose_port()
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768
