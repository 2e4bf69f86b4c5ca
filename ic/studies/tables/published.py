"""Published measurements: the results files of a checkout, and Markdown tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs" / "results"


def load(file: str) -> dict[str, Any]:
    """A results file by its name."""
    data: dict[str, Any] = json.loads((RESULTS / file).read_text())
    return data


def markdown(
    heads: Sequence[str], lines: Iterable[Sequence[str]], *, left: int, text: Sequence[str] = ()
) -> list[str]:
    """Lines of a table whose first `left` columns, and those headed as in `text`, are set left, the
    others right.
    """
    sides = ["---" if n < left or head in text else "--:" for n, head in enumerate(heads)]
    return [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(sides)}|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
