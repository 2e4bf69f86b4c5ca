"""The programs of Debian's packages."""

from __future__ import annotations

import shutil

import pytest

PROGRAMS = (
    "prometheus", "promtool", "amtool", "prometheus-alertmanager", "prometheus-node-exporter",
)  # fmt: skip


@pytest.fixture(scope="session")
def programs() -> None:
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(
            f"no {', '.join(missing)}; on Debian: apt-get install prometheus "
            "prometheus-alertmanager prometheus-node-exporter"
        )
