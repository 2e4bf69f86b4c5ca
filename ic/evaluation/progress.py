"""What is shown while a suite is evaluated: how much there is to do, and how long it will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ic.display.numbers import clock_text
from ic.evaluation.answered import cell_row
from ic.evaluation.live_table import LiveTable
from ic.evaluation.suite import Cell, Row, Suite


class TimeLeft:
    """How long the samples that are missing will take, by those that have been answered.

    Seconds per prompt grow with a power of the length, between 1 (the weights' work) and 2 (the
    attention's), which the two longest measured lengths tell. With one length it is 1: the least.

    Args:
        cells: all cells.
        processes: which share their samples.
    """

    def __init__(self, cells: list[Cell], processes: int = 1) -> None:
        self._left = {cell: cell.samples for cell in cells}
        self._processes = processes
        self._measured: dict[int, tuple[int, float]] = {}  # length -> prompts, seconds

    def add(self, cell: Cell, row: Row, before: bool = False) -> None:
        """Take note of a sample that has its row; one that was answered before, who knows where,
        says nothing of how long others take here.
        """
        self._left[cell] -= 1
        if before:
            return
        prompts, seconds = self._measured.get(cell.length_tokens, (0, 0.0))
        self._measured[cell.length_tokens] = (prompts + 1, seconds + row["seconds"])

    def __str__(self) -> str:
        """`about 0:12:30 left`; empty where nothing is left or nothing is known."""
        per_prompt = {n: s / prompts for n, (prompts, s) in self._measured.items() if s and prompts}
        left = {cell: count for cell, count in self._left.items() if count}
        if not left or not per_prompt:
            return ""
        *shorter, longest = sorted(per_prompt)
        power = 1.0
        if shorter:
            growth = math.log(per_prompt[longest] / per_prompt[shorter[-1]])
            power = min(2.0, max(1.0, growth / math.log(longest / shorter[-1])))
        seconds = sum(
            count
            * per_prompt.get(
                cell.length_tokens, per_prompt[longest] * (cell.length_tokens / longest) ** power
            )
            for cell, count in left.items()
        )
        beyond = any(cell.length_tokens not in per_prompt for cell in left)
        word = "about" if shorter or not beyond else "at least"
        return f"{word} {clock_text(seconds / self._processes)} left"


@contextmanager
def suite_progress(
    suite: Suite[Any], *, quiet: bool = False, processes: int = 1
) -> Iterator[Callable[..., None]]:
    """A table that fills up and a progress bar on a terminal, elsewhere a line per cell -> what to
    call with each sample, as `run_suite` does.

    Says first how many prompts there are, and from the first on how long the others will take.

    Args:
        processes: which share the samples.
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
    answered: dict[Cell, list[Row]] = {cell: [] for cell in cells}
    taken: dict[Cell, list[float]] = {cell: [] for cell in cells}
    prompts = sum(cell.samples for cell in cells)
    if not quiet:
        lengths = sorted({cell.length_tokens for cell in cells})
        print(
            f"{suite.name}: {len(cells)} cells, {prompts:,} prompts of "
            + " to ".join(f"{n:,}" for n in dict.fromkeys((lengths[0], lengths[-1])))
            + " tokens",
            flush=True,
        )
    bar, table = Progress(*columns, console=console), LiveTable(suite)
    task = bar.add_task("", total=prompts)
    live = Live(Group(table, bar), console=console, transient=True)
    with nullcontext() if quiet or not console.is_terminal else live:

        def on_sample(cell: Cell, row: Row, before: bool = False) -> None:
            left.add(cell, row, before)
            answered[cell].append(row)
            if not before:
                taken[cell].append(row["seconds"])
            table.add(cell, row)
            shown = f"{cell.length_tokens:,} tokens, {left}".removesuffix(", ")
            bar.update(task, advance=1, description=shown)
            whole = len(answered[cell]) == cell.samples
            if whole and not quiet and not console.is_terminal:
                said = suite.progress_text(cell_row(answered[cell]))
                line = f"{suite.name} {cell}: {said}{_time(cell, taken[cell])}, {left}"
                print(line.removesuffix(", "), flush=True)

        yield on_sample


def _time(cell: Cell, taken: list[float]) -> str:
    """` in 6.0 s`: what the answers took that were not there before."""
    if not taken:
        return ", answered before"
    before = cell.samples - len(taken)
    reused = f" for {len(taken)}, {before} answered before" if before else ""
    return f" in {round(sum(taken), 3)} s{reused}"
