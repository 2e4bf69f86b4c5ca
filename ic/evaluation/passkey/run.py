"""A passkey grid behind a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.suite import evaluate_grid
from ic.evaluation.runner import Ranks
from ic.inference.greedy import OnCache


def run_grid(
    model: Any,
    tokenizer: Any,
    grid: PasskeyGridConfig,
    results_file: Path,
    *,
    quiet: bool = False,
    on_cache: OnCache | None = None,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a grid behind a progress bar; resumes from `results_file`.

    `ranks` and `sharded` as in `evaluate_grid`.
    """
    cells = list(grid.cells())
    columns = (
        TextColumn("passkey"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cells))

        def on_cell(cell: Cell, row: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=f"{cell.length_tokens:,} tokens")
            if not quiet and not console.is_terminal:
                depth = "no needle" if cell.depth < 0 else f"depth {cell.depth:g}"
                print(
                    f"passkey {cell.task} {cell.length_tokens} tokens, {cell.filler}, {depth}: "
                    f"{row['correct']}/{row['n']} in {row['seconds']} s",
                    flush=True,
                )

        with torch.no_grad():
            return evaluate_grid(
                model,
                tokenizer,
                grid,
                results_file,
                on_cell,
                on_cache,
                ranks=ranks,
                sharded=sharded,
            )
