"""What is shown while a suite is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ic.evaluation.suite import Cell, Row, Suite


@contextmanager
def cell_progress(
    suite: Suite[Any], *, quiet: bool = False
) -> Iterator[Callable[[Cell, Row], None]]:
    """A progress bar on a terminal, elsewhere a line a cell -> what to call with each."""
    columns = (
        TextColumn(suite.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(1 for _ in suite.cells()))

        def on_cell(cell: Cell, row: Row) -> None:
            bar.update(task, advance=1, description=f"{cell.length_tokens:,} tokens")
            if not quiet and not console.is_terminal:
                print(
                    f"{suite.name} {cell}: {row['correct']}/{row['n']} in {row['seconds']} s",
                    flush=True,
                )

        yield on_cell
