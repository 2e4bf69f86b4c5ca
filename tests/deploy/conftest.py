from __future__ import annotations

import pytest

from tests.deploy.charts import INFRA


@pytest.fixture(autouse=True)
def tools(request: pytest.FixtureRequest) -> None:
    """Tests of the charts need Helm, which `make infra-env` brings."""
    if request.node.get_closest_marker("chart") and not (INFRA / "helm").exists():
        pytest.skip(f"no Helm in {INFRA}: make chart installs it")
