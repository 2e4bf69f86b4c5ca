"""Which rank answers which samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ic.evaluation.suite import C, Suite

# A prompt that begins anew is work for all; within this much of the best balance one more of them
# is not worth it.
_TOLERANCE = 1.05

# Cells that are answered in turn, each with the indices of the samples to answer.
Part = dict[C, list[int]]


# How many samples of a cell are answered together.
BatchSize = Callable[[C], int]


def batch_of_tokens(tokens: int) -> BatchSize[Any]:
    """As many samples as so many tokens of their cell's length."""
    return lambda cell: max(1, tokens // cell.length_tokens)


def share_of_samples(
    suite: Suite[C],
    missing: Mapping[C, Sequence[int]],
    rank: int,
    world: int,
    batch_size: BatchSize[C],
) -> list[Part[C]]:
    """What a rank answers.

    Each of the suite's groups is cut into parts of about equal work, a cell that is alone in its
    group at the ends of its batches; the most work is dealt out first, each part to the rank with
    the least so far.

    Args:
        missing: of each cell the samples that are not answered yet.
        batch_size: the same for all ranks.
    """
    groups = suite.groups([cell for cell, indices in missing.items() if indices])
    work = [_work(suite, {cell: list(missing[cell]) for cell in group}) for group in groups]
    loads = [0.0] * world
    own: dict[int, Part[C]] = {}
    for number in sorted(range(len(groups)), key=lambda n: -work[n]):
        parts = sorted(
            _parts(suite, groups[number], missing, world, batch_size),
            key=lambda part: -_work(suite, part),
        )
        free = sorted(range(world), key=lambda r: loads[r])
        for part, taker in zip(parts, free, strict=False):  # some ranks may get none
            loads[taker] += _work(suite, part)
            if taker == rank:
                own[number] = part
    return [own[number] for number in sorted(own)]


def _work(suite: Suite[C], part: Part[C]) -> float:
    """Work of the cells, by the share of their samples that are to be answered."""
    total = sum(cell.samples for cell in part)
    return suite.work(list(part)) * sum(map(len, part.values())) / total


def _parts(
    suite: Suite[C],
    group: list[C],
    missing: Mapping[C, Sequence[int]],
    most: int,
    batch_size: BatchSize[C],
) -> list[Part[C]]:
    if len(group) > 1:
        return [{cell: list(missing[cell]) for cell in cells} for cells in _cut(suite, group, most)]
    (cell,) = group
    size = batch_size(cell)
    batches: dict[int, list[int]] = {}
    for index in missing[cell]:
        batches.setdefault(index // size, []).append(index)
    in_order = list(batches.values())
    count = min(most, len(in_order))
    ends = [round(len(in_order) * part / count) for part in range(count + 1)]
    return [
        {cell: [index for batch in in_order[begin:end] for index in batch]}
        for begin, end in pairwise(ends)
    ]


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
