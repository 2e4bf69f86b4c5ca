"""How long the documents of a corpus are, on the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ic.display.figure import new_figure, save_png

_COLORS = {"book": "#3B6FB6", "code": "#D98032", "rfc": "#5B9A5B"}
_NAMES = {"book": "books", "code": "code", "rfc": "RFCs"}


def bins(lengths: Mapping[str, Sequence[int]]) -> list[int]:
    """Edges in bytes: powers of two from below the shortest document to above the longest."""
    all_lengths = [length for each in lengths.values() for length in each]
    least, most = min(all_lengths).bit_length() - 1, max(all_lengths).bit_length()
    return [2**power for power in range(least, most + 1)]


def histogram(lengths: Mapping[str, Sequence[int]]) -> list[tuple[int, int, int, int]]:
    """Rows of (from, below, documents, bytes in them), in bytes, shortest first."""
    edges, pooled = bins(lengths), np.array([n for each in lengths.values() for n in each])
    rows = []
    for low, high in pairwise(edges):
        here = pooled[(pooled >= low) & (pooled < high)]
        rows.append((low, high, len(here), int(here.sum())))
    return rows


def draw_lengths(lengths: Mapping[str, Sequence[int]], path: Path, *, title: str) -> None:
    """Draw how many documents there are of each length, and how much text is in them."""
    edges = bins(lengths)
    figure = new_figure(8.0, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    kinds = list(lengths)
    colors = [_COLORS[kind] for kind in kinds]
    names = [f"{_NAMES[kind]} ({len(lengths[kind]):,})" for kind in kinds]
    columns = [np.asarray(lengths[kind]) for kind in kinds]
    for axis, weights, label in (
        (left, None, "documents"),
        (right, [column / 1e6 for column in columns], "MB of text"),
    ):
        axis.hist(columns, bins=edges, weights=weights, stacked=True, color=colors, label=names)
        axis.set_xscale("log", base=2)
        axis.set_xticks(edges[::2], [_size(edge) for edge in edges[::2]])
        axis.set_xlabel("length of a document in bytes")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path, dpi=150)


def _size(nbytes: int) -> str:
    for unit, name in ((2**20, " MiB"), (2**10, " KiB")):
        if nbytes >= unit:
            return f"{nbytes // unit}{name}"
    return f"{nbytes} B"
