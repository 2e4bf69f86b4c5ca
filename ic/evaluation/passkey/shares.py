"""Which rank evaluates which cells of a passkey grid.

Work is counted as the (query, key) pairs of a prompt that a decoder has to process: at the lengths
that take time nothing else counts.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

from ic.evaluation.passkey.grid import CONTROL, Cell, PasskeyGridConfig
from ic.evaluation.passkey.prompts import haystack_of

# One more start of a haystack than needed is work for all; within this much of the best it is not
# worth it.
_TOLERANCE = 1.05


def share_of_cells(
    grid: PasskeyGridConfig, cells: list[Cell], rank: int, world: int
) -> list[list[Cell]]:
    """What a rank evaluates: lists of cells that are answered together.

    The cells of a task, length and filler are cut into parts of about equal work; the most work is
    dealt out first, each part to the rank with the least so far. With `share_haystack` a list holds
    the cells of one haystack after another, the deepest first, which begins like most.
    """
    groups = []
    for _, same in groupby(cells, key=attrgetter("task", "length_tokens", "filler")):
        group = list(same)
        if grid.share_haystack:
            group.sort(key=lambda c: (haystack_of(grid, c), -_depth_reached(c)))
        groups.append(group)
    loads = [0.0] * world
    own: dict[int, list[Cell]] = {}
    for number in sorted(range(len(groups)), key=lambda n: -_work(grid, groups[n])):
        parts = sorted(_cut(grid, groups[number], world), key=lambda part: -_work(grid, part))
        free = sorted(range(world), key=lambda r: loads[r])
        for part, taker in zip(parts, free, strict=False):  # some ranks may get none
            loads[taker] += _work(grid, part)
            if taker == rank:
                own[number] = part
    in_order = [own[number] for number in sorted(own)]
    return in_order if grid.share_haystack else [[cell] for part in in_order for cell in part]


def _cut(grid: PasskeyGridConfig, group: list[Cell], most: int) -> list[list[Cell]]:
    """Contiguous parts whose largest work is about the least there can be, as few as that takes."""
    size = len(group)
    work = {(i, j): _work(grid, group[i:j]) for i in range(size) for j in range(i + 1, size + 1)}
    # For each number of parts, by where the last one ends: largest work, where the last one begins.
    rows: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for count in range(1, min(most, size) + 1):
        rows.append(
            {
                end: min(
                    (max(rows[-1][begin][0], work[begin, end]), begin)
                    for begin in rows[-1]
                    if begin < end
                )
                for end in range(count, size + 1)
            }
        )
    best = min(row[size][0] for row in rows[1:])
    count = next(n for n, row in enumerate(rows) if n and row[size][0] <= _TOLERANCE * best)
    parts: list[list[Cell]] = []
    end = size
    while end:
        begin = rows[count][end][1]
        parts.insert(0, group[begin:end])
        end, count = begin, count - 1
    return parts


def _work(grid: PasskeyGridConfig, part: list[Cell]) -> float:
    total = 0.0
    before: Cell | None = None
    for cell in part:
        kept = 0.0
        if (
            grid.share_haystack
            and before is not None
            and haystack_of(grid, before) == haystack_of(grid, cell)
        ):
            kept = 1.0 if cell.task == "multi_key" else _depth_reached(cell)
        total += cell.samples * cell.length_tokens**2 * (1 - kept**2)
        before = cell
    return total


def _depth_reached(cell: Cell) -> float:
    """How much of its haystack a prompt has in common with those of greater depth."""
    return 1.0 if cell.depth == CONTROL else cell.depth
