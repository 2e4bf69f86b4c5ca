"""What is shown while something is measured that has a known number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ic.display.numbers import clock_text

# Elsewhere than on a terminal a line is printed whenever this share of the work is done.
_SHARE = 0.2


@contextmanager
def steps(name: str, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left on a terminal, elsewhere a line now and then -> what to call with
    how many steps were done.

    Args:
        what: a step is, in the plural: `tokens`.
    """
    console = Console()
    began, done, said = time.perf_counter(), 0, 0.0
    columns = (
        *(TextColumn(name), BarColumn(bar_width=14), MofNCompleteColumn(), TextColumn(what)),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=total)
    if total:
        print(f"{name}: {total:,} {what}", flush=True)

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        bar.update(task, completed=done)
        if not console.is_terminal and done / total >= min(1.0, said + _SHARE):
            said = done / total
            seconds = time.perf_counter() - began
            left = f", about {clock_text(seconds / done * (total - done))} left"
            line = f"{name}: {done:,} of {total:,} {what} in {clock_text(seconds)}"
            print(line + (left if done < total else ""), flush=True)

    with bar:
        yield advance
