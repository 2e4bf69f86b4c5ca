"""The needle heatmap: lengths by depths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.evaluation.by_depth import EXACT, ShownCell, pool_cells
from ic.evaluation.options import CONTROL
from ic.evaluation.suite import Row

# Dark violet over green to yellow: it grows lighter all the way, for every kind of colour vision. 0
# and 1 are fixed, so that two heatmaps can be compared by eye.
COLORS = "viridis"
# No result of the model's: what it says where there is nothing to find.
CONTROL_COLOR = "#E2E2E2"
_DARK, _LIGHT = "#1A1A1A", "#FFFFFF"
LEGEND = "in each cell: {} of n prompts, and their 95 % interval in per cent (Wilson)"
CONTROL_LEGEND = "grey: the same questions with no needle in the text"


def draw_by_depth(
    rows: Sequence[Row],
    path: Path,
    *,
    title: str,
    trained_length: int | None = None,
    counted: str = EXACT,
) -> None:
    """Draw a panel for each task: exact tokens on a log2 axis, depth from 0 at the top, n and
    interval in each cell. Many tasks stand in several columns, so that the picture is not tall.

    A dashed line marks the longest length that was trained, or the picture says that all lengths
    are beyond it; the grey strip below shows the control without needle.

    Args:
        counted: what the suite counts.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import PercentFormatter

    cells = pool_cells(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({cell.length_tokens for cell in cells})
    depths = sorted({cell.depth for cell in cells if not cell.is_control})
    control = any(cell.is_control for cell in cells)
    edges = _log2_edges(lengths)
    note, mark = _trained(trained_length, lengths, edges)
    legend = [LEGEND.format(counted), *[CONTROL_LEGEND] * control, *[note] * (len(tasks) > 1)]

    panel_height = 0.42 * len(depths) + (0.75 if control else 0) + 0.7
    panel_width = max(3.6, 1.0 + 0.8 * len(lengths))
    columns = _columns(len(tasks), panel_width, panel_height)
    lines = -(-len(tasks) // columns)
    width = max(6.4, 2.4 + 0.8 * len(lengths)) if columns == 1 else 1.4 + columns * panel_width
    height = 2.1 + lines * panel_height
    figure = new_figure(width, height)
    strips = [len(depths), 1] if control else [len(depths)]
    axes = figure.subplots(
        len(strips) * lines, columns, sharex=True, squeeze=False, height_ratios=strips * lines
    )
    kinds = [(depths, matplotlib.colormaps[COLORS]), ([CONTROL], ListedColormap([CONTROL_COLOR]))]
    image = None
    for place, task in enumerate(tasks):
        line, column = divmod(place, columns)
        panels = axes[len(strips) * line : len(strips) * (line + 1), column]
        of_task = [cell for cell in cells if cell.task == task]
        for axis, (rows_of, colors) in zip(panels, kinds, strict=False):
            drawn = _draw_panel(axis, of_task, rows_of, lengths, edges, colors)
            image = drawn if rows_of is depths else image
            if mark is not None:
                axis.axvline(mark, color="#222222", linestyle="--", linewidth=1.4)
            axis.tick_params(labelleft=column == 0)
        if column == 0:
            panels[0].set_ylabel("depth of the needle")
        if len(tasks) > 1:
            panels[0].set_title(task, fontsize=10, fontweight="bold", loc="left")
        else:
            panels[0].set_title(note, fontsize=8, loc="right")
        if place + columns >= len(tasks):  # the last one of its column
            panels[-1].set_xticks(lengths, [tokens(length) for length in lengths])
            panels[-1].tick_params(labelbottom=True)
            panels[-1].set_xlabel("prompt length in tokens")
    shown = [axis for axis in axes.flat if axis.has_data()]
    for axis in axes.flat:
        if not axis.has_data():
            axis.remove()
    figure.supxlabel("\n".join(filter(None, legend)), fontsize=7, color="#444444")
    figure.suptitle(title, fontsize=11)
    assert image is not None
    bar = figure.colorbar(
        image,
        ax=shown,
        fraction=0.04,
        pad=0.02,
        format=PercentFormatter(1, 0, ""),
        # Of many panels at the top, where reading begins, and not longer than it has to be.
        shrink=1.0 if lines == 1 else min(1.0, 3.2 / height),
        anchor=(0.0, 0.5 if lines == 1 else 1.0),
    )
    bar.set_label(f"{counted} in per cent")
    save_png(figure, path, dpi=150)


def _columns(panels: int, width: float, height: float) -> int:
    """The fewest columns that make a picture which is not taller than wide."""
    if panels <= 2:
        return 1
    fits = (n for n in range(1, panels) if -(-panels // n) * height <= 1.1 * n * width)
    return next(fits, panels)


def _trained(
    trained_length: int | None, lengths: list[int], edges: np.ndarray
) -> tuple[str, float | None]:
    """What is said of the length that was trained, and where it is marked."""
    if trained_length and trained_length < lengths[0]:
        return f"trained to {trained_length:,} tokens; every length here is beyond that", None
    if trained_length and trained_length < edges[-1]:
        mark = _just_after(trained_length, lengths, edges)
        return f"dashed: trained to {trained_length:,} tokens", mark
    return "", None


def _draw_panel(
    axis: Any,
    cells: Sequence[ShownCell],
    depths: list[float],
    lengths: list[int],
    edges: np.ndarray,
    colors: Any,
) -> Any:
    """A task's cells at these depths; `CONTROL` alone is the strip without a needle."""
    is_control = depths == [CONTROL]
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        if cell.depth in depths:
            y, x = depths.index(cell.depth), lengths.index(cell.length_tokens)
            grid[y, x] = cell.accuracy.share
            is_dark = not is_control and cell.accuracy.share < 0.6
            center = (edges[x] * edges[x + 1]) ** 0.5
            _annotate(axis, cell, center, y, _LIGHT if is_dark else _DARK)
    drawn = axis.pcolormesh(
        edges,
        np.arange(len(depths) + 1) - 0.5,
        grid,
        cmap=colors,
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=1.5,
    )
    axis.set_xscale("log", base=2)
    axis.invert_yaxis()
    labels = ["no needle"] if is_control else [f"{100 * depth:g} %" for depth in depths]
    axis.set_yticks(range(len(depths)), labels)
    axis.set_xticks(lengths, [tokens(length) for length in lengths])
    axis.tick_params(length=0, labelbottom=False)
    axis.minorticks_off()
    axis.spines[:].set_visible(False)
    return drawn


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
