"""Published measurements: the results files of a checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs" / "results"


def load(file: str) -> dict[str, Any]:
    """A results file by its name."""
    data: dict[str, Any] = json.loads((RESULTS / file).read_text())
    return data
