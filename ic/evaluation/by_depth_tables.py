"""Accuracy of needles by task and length as tables: for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ic.evaluation.by_depth import EXACT, pool_depths
from ic.evaluation.suite import Row


def terminal_table(rows: Sequence[Row], *, title: str, counted: str = EXACT) -> Table:
    """Accuracy by length with n, interval, worst depth, and the control.

    Args:
        counted: what the suite counts.
    """
    table = Table(
        title=title,
        caption=f"acc. %: {counted} per cent, and Wilson's 95 % interval",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # with a prompt of 1,048,576 tokens it fits 80 columns
    )
    for name in ("task", "tokens", "correct", "acc. %", "95 %", "worst cell", "no needle"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for shown in pool_depths(rows):
        low, high = shown.accuracy.interval
        table.add_row(
            shown.task,
            f"{shown.length_tokens:,}",
            str(shown.accuracy),
            f"{100 * shown.accuracy.share:.1f}",
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{shown.worst.accuracy}, depth {100 * shown.worst.depth:.3g} %",
            str(shown.control or "-"),
        )
    return table


def document_table(
    rows: Sequence[Row], *, counted: str = EXACT
) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: what is `counted` by length with interval, worst depth and control."""
    heads = ["task", "tokens", counted, "95 % interval", "worst depth", "no needle"]
    lines = []
    for shown in pool_depths(rows):
        low, high = shown.accuracy.interval
        lines.append(
            [
                shown.task,
                f"{shown.length_tokens:,}",
                str(shown.accuracy),
                f"{100 * low:.1f}-{100 * high:.1f} %",
                str(shown.worst.accuracy),
                str(shown.control or "-"),
            ]
        )
    return heads, lines
