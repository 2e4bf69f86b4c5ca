"""A real MLflow server on SQLite, which can be killed and started again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

_START_S = 300  # a busy machine makes the tables of a new database in a minute


class MLflowServer:
    """A server with its data in a folder.

    Attributes:
        uri: its address, the same after each start.
        data: folder of its database and files.
    """

    def __init__(self, folder: Path) -> None:
        program = os.environ.get("MLFLOW_SERVER") or shutil.which("mlflow")
        if program is None or not Path(program).is_file():
            pytest.skip("no MLflow server: `make tracking` installs one")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.data = folder
        self._command = [
            *(program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.data / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=env, start_new_session=True
            )
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)  # between two questions whether it listens
        raise AssertionError((self.data / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """End the server and its workers at once, as a power loss does."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
