"""Which cells of a passkey grid share a haystack, and what that saves.

With `share_haystack` the cells of a task, length and filler are answered one haystack after
another, the deepest first, which begins like most.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from ic.evaluation.options import CONTROL
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig


def haystack_of(grid: PasskeyGridConfig, cell: Cell) -> int:
    """Which of the haystacks of its task, length and filler a cell's samples hide in.

    One serves every depth of `single`. One of `multi_key` holds `num_needles + 1` named keys, each
    asked for in turn with the others as distractors.
    """
    return 0 if cell.depth == CONTROL else grid.depths.index(cell.depth) % num_haystacks(grid, cell)


def num_haystacks(grid: PasskeyGridConfig, cell: Cell) -> int:
    """How many haystacks the depths of a task, length and filler take."""
    return 1 if cell.task == "single" else -(-len(grid.depths) // (grid.num_needles + 1))


def group_by_haystack(grid: PasskeyGridConfig, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of a task, length and filler, in the order in which to answer them."""
    return [
        sorted(same, key=lambda cell: (haystack_of(grid, cell), -_depth_reached(cell)))
        for _, same in groupby(cells, key=attrgetter("task", "length_tokens", "filler"))
    ]


def work_in_haystacks(grid: PasskeyGridConfig, cells: Sequence[Cell]) -> float:
    """(query, key) pairs that a decoder has to process for cells in their order."""
    total = 0.0
    before: Cell | None = None
    for cell in cells:
        kept = 0.0
        if before is not None and haystack_of(grid, before) == haystack_of(grid, cell):
            kept = 1.0 if cell.task == "multi_key" else _depth_reached(cell)
        total += cell.samples * cell.length_tokens**2 * (1 - kept**2)
        before = cell
    return total


def _depth_reached(cell: Cell) -> float:
    """How much of its haystack a prompt has in common with those of greater depth."""
    return 1.0 if cell.depth == CONTROL else cell.depth
