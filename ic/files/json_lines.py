"""Files of JSON lines that survive a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ic.files.atomic_write import replacing


def rank_file(results_file: Path, rank: int) -> Path:
    """Where a rank that shares a grid writes its cells until they are merged."""
    return results_file.with_name(f"{results_file.stem}.rank{rank}.jsonl")


def read_rows(results_file: Path) -> list[dict[str, Any]]:
    """Rows of a cells file; a last line that a crash cut short is dropped from the file.

    Raises:
        ValueError: any other line that is not JSON.
    """
    if not results_file.is_file():
        return []
    rows, lines = [], results_file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                with replacing(results_file) as temporary:
                    temporary.write_text("".join(lines[:-1]))
                break
            raise ValueError(
                f"{results_file}, line {number}: not JSON ({error}); repair or delete the file"
            ) from error
    return rows
