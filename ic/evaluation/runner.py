"""Processes that share an evaluation, and the files they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from ic.files.atomic_write import replacing
from ic.files.json_lines import read_rows


class Ranks(Protocol):
    """Processes that share a grid, each with the whole model: a Lightning strategy or Fabric."""

    @property
    def global_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self, name: str | None = None) -> None: ...


def merge_rank_files(results_file: Path, ranks: Ranks | None = None) -> None:
    """Append the ranks' cells to `results_file` and remove their files; every rank calls this."""
    if ranks is not None:
        ranks.barrier("passkey cells written")
    if ranks is None or ranks.global_rank == 0:
        files = sorted(results_file.parent.glob(f"{results_file.stem}.rank*.jsonl"))
        rows = [row for file in (results_file, *files) for row in read_rows(file)]
        if files:
            with replacing(results_file) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file in files:
            file.unlink()
    if ranks is not None:
        ranks.barrier("passkey cells merged")
