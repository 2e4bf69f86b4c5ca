"""Cells of needles as they are shown: one per task, length and depth, whatever else they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ic.evaluation.options import CONTROL
from ic.evaluation.statistics import Accuracy, pool
from ic.evaluation.suite import Row

EXACT = "exact answers"  # what is counted, unless a suite says otherwise


@dataclass(frozen=True)
class ShownCell:
    """One length and depth of a task; `depth` is `CONTROL` where no needle is hidden."""

    task: str
    length_tokens: int
    depth: float
    accuracy: Accuracy

    @property
    def is_control(self) -> bool:
        return self.depth == CONTROL


@dataclass(frozen=True)
class ShownLength:
    """One length of a task.

    Attributes:
        accuracy: all depths pooled.
        worst: the depth with the fewest right answers.
        control: without a needle, if that was measured.
    """

    task: str
    length_tokens: int
    accuracy: Accuracy
    worst: ShownCell
    control: Accuracy | None


def is_control(row: Row) -> bool:
    """Whether a row of a cells file or of a results file was answered without a needle."""
    return row["depth"] in (CONTROL, "control")


def pool_cells(rows: Sequence[Row]) -> list[ShownCell]:
    """Add up the cells of each task, length and depth, in that order."""
    named = ({**row, "depth": CONTROL if is_control(row) else row["depth"]} for row in rows)
    pooled = pool(named, "task", "length_tokens", "depth")
    return [
        ShownCell(task, length, depth, pooled[task, length, depth])
        for task, length, depth in sorted(pooled)
    ]


def pool_depths(rows: Sequence[Row]) -> list[ShownLength]:
    """Add up the cells of each task and length, in that order; of controls alone none is shown."""
    cells = pool_cells(rows)
    found = []
    for task, length in dict.fromkeys((cell.task, cell.length_tokens) for cell in cells):
        here = [c for c in cells if (c.task, c.length_tokens) == (task, length)]
        hidden = [c for c in here if not c.is_control]
        if not hidden:  # a kind of key that came up in controls only
            continue
        n = sum(c.accuracy.n for c in hidden)
        found.append(
            ShownLength(
                task,
                length,
                Accuracy(sum(c.accuracy.correct for c in hidden), n),
                min(hidden, key=lambda cell: cell.accuracy.share),
                next((c.accuracy for c in here if c.is_control), None),
            )
        )
    return found


def depth_rows(cells: Sequence[Row], what: str) -> list[Row]:
    """One row of a results file a shown cell."""
    return [
        {
            "what": what,
            "task": cell.task,
            "length_tokens": cell.length_tokens,
            "depth": "control" if cell.is_control else cell.depth,
            **cell.accuracy.columns,
        }
        for cell in pool_cells(cells)
    ]
