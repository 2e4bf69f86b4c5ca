"""Folders of tiny models, made once for a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.parity import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    llama = models.save_llama(root / "llama")
    return {
        "llama": llama,
        "mla": models.save_mla(root / "mla"),
        "damaged": models.save_damaged(llama, root / "damaged"),
        "text": models.write_text(root / "text.txt"),
        "reports": root / "reports",
    }
