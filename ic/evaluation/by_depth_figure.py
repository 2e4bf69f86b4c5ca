"""The needle heatmap: lengths by depths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.evaluation.by_depth import ShownCell, pool_cells
from ic.evaluation.options import CONTROL
from ic.evaluation.suite import Row

# Dark violet over green to yellow: it grows lighter all the way, for every kind of colour vision. 0
# and 1 are fixed, so that two heatmaps can be compared by eye.
COLORS = "viridis"
# No result of the model's: what it says where there is nothing to find.
CONTROL_COLOR = "#E2E2E2"
_DARK, _LIGHT = "#1A1A1A", "#FFFFFF"
LEGEND = "in each cell: exact answers of n prompts, and their 95 % interval in per cent (Wilson)"
CONTROL_LEGEND = "grey: the same questions with no needle in the text"


def draw_by_depth(
    rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
) -> None:
    """Draw a panel for each task: exact tokens on a log2 axis, depth from 0 at the top, n and
    interval in each cell.

    A dashed line marks the longest length that was trained, or the title says that all lengths are
    beyond it; the grey strip below shows the control without needle.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import PercentFormatter

    cells = pool_cells(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({cell.length_tokens for cell in cells})
    depths = sorted({cell.depth for cell in cells if not cell.is_control})
    control = any(cell.is_control for cell in cells)
    colors, neutral = matplotlib.colormaps[COLORS], ListedColormap([CONTROL_COLOR])

    height = 2.1 + len(tasks) * (0.42 * len(depths) + (0.75 if control else 0) + 0.7)
    figure = new_figure(max(6.4, 2.4 + 0.8 * len(lengths)), height)
    ratios = ([len(depths), 1] if control else [len(depths)]) * len(tasks)
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    edges = _log2_edges(lengths)
    image = None
    for panel, axis in enumerate(axes):
        is_control = control and panel % 2 == 1
        task = tasks[panel // 2 if control else panel]
        rows_of = [CONTROL] if is_control else depths
        grid = np.full((len(rows_of), len(lengths)), np.nan)
        for cell in cells:
            if cell.task == task and cell.depth in rows_of:
                y, x = rows_of.index(cell.depth), lengths.index(cell.length_tokens)
                grid[y, x] = cell.accuracy.share
                is_dark = not is_control and cell.accuracy.share < 0.6
                center = (edges[x] * edges[x + 1]) ** 0.5
                _annotate(axis, cell, center, y, _LIGHT if is_dark else _DARK)
        drawn = axis.pcolormesh(
            edges,
            np.arange(len(rows_of) + 1) - 0.5,
            grid,
            cmap=neutral if is_control else colors,
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=1.5,
        )
        image = image if is_control else drawn
        axis.set_xscale("log", base=2)
        axis.invert_yaxis()
        labels = ["no needle"] if is_control else [f"{100 * depth:g} %" for depth in depths]
        axis.set_yticks(range(len(rows_of)), labels)
        axis.tick_params(length=0)
        axis.minorticks_off()
        axis.spines[:].set_visible(False)
        note = ""
        if trained_length and trained_length < lengths[0]:
            note = f"trained to {trained_length:,} tokens; every length here is beyond that"
        elif trained_length and trained_length < edges[-1]:
            mark = _just_after(trained_length, lengths, edges)
            axis.axvline(mark, color="#222222", linestyle="--", linewidth=1.4)
            note = f"dashed: trained to {trained_length:,} tokens"
        if panel == 0:
            axis.set_title(note, fontsize=8, loc="right")
        if not is_control:
            axis.set_ylabel(
                f"{task}\ndepth of the needle" if len(tasks) > 1 else "depth of the needle"
            )
    axes[-1].set_xticks(lengths, [tokens(length) for length in lengths])
    axes[-1].set_xlabel("prompt length in tokens")
    legend = f"{LEGEND}\n{CONTROL_LEGEND}" if control else LEGEND
    figure.supxlabel(legend, fontsize=7, color="#444444")
    figure.suptitle(title, fontsize=11)
    assert image is not None
    percent = PercentFormatter(1, 0, "")
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02, format=percent)
    bar.set_label("exact answers in per cent")
    save_png(figure, path, dpi=150)


def _annotate(axis: Any, cell: ShownCell, x: float, y: int, color: str) -> None:
    low, high = cell.accuracy.interval
    axis.text(
        x,
        y,
        f"{cell.accuracy}\n[{100 * low:.0f}-{100 * high:.0f}]",
        ha="center",
        va="center",
        fontsize=7,
        color=color,
    )


def _log2_edges(lengths: list[int]) -> np.ndarray:
    logs = np.log2(lengths)
    if len(logs) == 1:
        return 2 ** np.array([logs[0] - 0.5, logs[0] + 0.5])
    middle = (logs[1:] + logs[:-1]) / 2
    return 2 ** np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]])


def _just_after(trained: int, lengths: list[int], edges: np.ndarray) -> float:
    """The edge behind the longest trained column; the exact length between columns."""
    if trained in lengths:
        return float(edges[lengths.index(trained) + 1])
    return float(trained)
