"""Tables that fit a terminal: too many columns for its width are shown below each other."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str,
    fixed: int = 1,
    caption: str | None = None,
    ends: Sequence[int] = (),
    console: Console | None = None,
) -> None:
    """Print a table; if it is wider than the terminal, as several that repeat the first columns.

    Args:
        heads: of the columns.
        rows: a text for each column.
        fixed: columns on the left that say what a row is, repeated in each table.
        caption: below the last.
        ends: indices of rows below which there is a line.
    """
    console = console or Console()
    groups: list[list[int]] = []
    rest = list(range(fixed, len(heads)))
    while rest:
        number = len(rest)
        while number > 1 and _width(console, _table(heads, rows, fixed, rest[:number], ends)) > (
            console.width
        ):
            number -= 1
        groups.append(rest[:number])
        rest = rest[number:]
    for place, group in enumerate(groups):
        table = _table(heads, rows, fixed, group, ends)
        table.title = title if place == 0 else None
        table.caption = caption if place == len(groups) - 1 else None
        console.print(table)


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    fixed: int,
    group: Sequence[int],
    ends: Sequence[int],
) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [*range(fixed), *group]
    for column in shown:
        table.add_column(heads[column], justify="left" if column < fixed else "right")
    for number, row in enumerate(rows):
        table.add_row(*(row[column] for column in shown), end_section=number in ends)
    return table


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum
