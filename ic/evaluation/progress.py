"""What is shown while a suite is evaluated: how much there is to do, and how long it will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ic.display.numbers import clock_text
from ic.evaluation.suite import Cell, Row, Suite


class TimeLeft:
    """How long the cells that are missing will take, by those that have been measured.

    Seconds per prompt grow with a power of the length, between 1 (the weights' work) and 2 (the
    attention's), which the two longest measured lengths tell. With one length it is 1: the least.

    Args:
        cells: all cells.
        processes: which share them.
    """

    def __init__(self, cells: list[Cell], processes: int = 1) -> None:
        self._left = dict.fromkeys(cells)
        self._processes = processes
        self._measured: dict[int, tuple[int, float]] = {}  # length -> prompts, seconds

    def add(self, cell: Cell, row: Row) -> None:
        """Take note of a cell that has its row."""
        self._left.pop(cell, None)
        prompts, seconds = self._measured.get(cell.length_tokens, (0, 0.0))
        self._measured[cell.length_tokens] = (prompts + row["n"], seconds + row["seconds"])

    def __str__(self) -> str:
        """`about 0:12:30 left`; empty where nothing is left or nothing is known."""
        per_prompt = {n: s / prompts for n, (prompts, s) in self._measured.items() if s and prompts}
        if not self._left or not per_prompt:
            return ""
        *shorter, longest = sorted(per_prompt)
        power = 1.0
        if shorter:
            growth = math.log(per_prompt[longest] / per_prompt[shorter[-1]])
            power = min(2.0, max(1.0, growth / math.log(longest / shorter[-1])))
        seconds = sum(
            cell.samples
            * per_prompt.get(
                cell.length_tokens, per_prompt[longest] * (cell.length_tokens / longest) ** power
            )
            for cell in self._left
        )
        beyond = any(cell.length_tokens not in per_prompt for cell in self._left)
        word = "about" if shorter or not beyond else "at least"
        return f"{word} {clock_text(seconds / self._processes)} left"


@contextmanager
def cell_progress(
    suite: Suite[Any], *, quiet: bool = False, processes: int = 1
) -> Iterator[Callable[[Cell, Row], None]]:
    """A progress bar on a terminal, elsewhere a line per cell -> what to call with each.

    Says first how many prompts there are, and from the first cell on how long the others will take.

    Args:
        processes: which share the cells.
    """
    columns = (
        TextColumn(suite.name),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    console = Console()
    cells = list(suite.cells())
    left = TimeLeft(cells, processes)
    if not quiet:
        lengths = sorted({cell.length_tokens for cell in cells})
        print(
            f"{suite.name}: {len(cells)} cells, {sum(cell.samples for cell in cells):,} prompts of "
            + " to ".join(f"{n:,}" for n in dict.fromkeys((lengths[0], lengths[-1])))
            + " tokens",
            flush=True,
        )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cells))

        def on_cell(cell: Cell, row: Row) -> None:
            left.add(cell, row)
            shown = f"{cell.length_tokens:,} tokens, {left}".removesuffix(", ")
            bar.update(task, advance=1, description=shown)
            if not quiet and not console.is_terminal:
                line = f"{suite.name} {cell}: {suite.progress_text(row)} in {row['seconds']} s"
                print(f"{line}, {left}".removesuffix(", "), flush=True)

        yield on_cell
