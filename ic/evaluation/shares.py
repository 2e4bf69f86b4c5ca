"""Which rank answers which cells."""

from __future__ import annotations

from collections.abc import Sequence

from ic.evaluation.suite import C, Suite

# A prompt that begins anew is work for all; within this much of the best balance one more of them
# is not worth it.
_TOLERANCE = 1.05


def share_of_cells(suite: Suite[C], cells: Sequence[C], rank: int, world: int) -> list[list[C]]:
    """What a rank evaluates: lists of cells that are answered in turn.

    Each of the suite's groups is cut into parts of about equal work; the most work is dealt out
    first, each part to the rank with the least so far.
    """
    groups = suite.groups(cells)
    loads = [0.0] * world
    own: dict[int, list[C]] = {}
    for number in sorted(range(len(groups)), key=lambda n: -suite.work(groups[n])):
        parts = sorted(_cut(suite, groups[number], world), key=lambda part: -suite.work(part))
        free = sorted(range(world), key=lambda r: loads[r])
        for part, taker in zip(parts, free, strict=False):  # some ranks may get none
            loads[taker] += suite.work(part)
            if taker == rank:
                own[number] = part
    return [own[number] for number in sorted(own)]


def _cut(suite: Suite[C], group: list[C], most: int) -> list[list[C]]:
    """Contiguous parts whose largest work is about the least there can be, as few as that takes."""
    size = len(group)
    work = {(i, j): suite.work(group[i:j]) for i in range(size) for j in range(i + 1, size + 1)}
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
    parts: list[list[C]] = []
    end = size
    while end:
        begin = rows[count][end][1]
        parts.insert(0, group[begin:end])
        end, count = begin, count - 1
    return parts
