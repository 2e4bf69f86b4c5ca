"""A real MLflow server for the tests that ask for one, and the environment that names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ic.tracking.registry import registered_folder
from tests.tracking.mlflow_server import MLflowServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    found = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        found.start()
        yield found
    finally:
        found.kill()


@pytest.fixture
def mlflow_environment(
    server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registered_folder.cache_clear()
    yield
    registered_folder.cache_clear()
