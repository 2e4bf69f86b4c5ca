"""Scores of tasks by length as a picture: tasks down, lengths across."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.evaluation.statistics import Accuracy

# As the needle heatmap, so that pictures of different suites read alike.
COLORS = "viridis"
_DARK, _LIGHT = "#1A1A1A", "#FFFFFF"
LEGEND = "in each cell: score in per cent, and its 95 % interval (Wilson)"


def draw_by_length(
    answers: Mapping[tuple[str, int], Accuracy],
    path: Path,
    *,
    title: str,
    trained_length: int | None = None,
) -> None:
    """Draw the PNG file `path`; 0 and 1 have fixed colours, so that two pictures can be compared.

    Args:
        answers: by task and length in tokens.
        trained_length: longest context in tokens that was trained, marked by a dashed line.
    """
    from matplotlib.ticker import PercentFormatter

    tasks = list(dict.fromkeys(task for task, _ in answers))
    lengths = sorted({length for _, length in answers})
    shares = np.full((len(tasks), len(lengths)), np.nan)
    figure = new_figure(max(6.4, 3.4 + 0.8 * len(lengths)), 1.9 + 0.42 * len(tasks))
    axis = figure.subplots()
    for (task, length), accuracy in answers.items():
        y, x = tasks.index(task), lengths.index(length)
        shares[y, x] = accuracy.share
        low, high = accuracy.interval
        axis.text(
            x,
            y,
            f"{100 * accuracy.share:.0f}\n[{100 * low:.0f}-{100 * high:.0f}]",
            ha="center",
            va="center",
            fontsize=7,
            color=_LIGHT if accuracy.share < 0.6 else _DARK,
        )
    image = axis.pcolormesh(
        np.arange(len(lengths) + 1) - 0.5,
        np.arange(len(tasks) + 1) - 0.5,
        shares,
        cmap=COLORS,
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=1.5,
    )
    axis.invert_yaxis()
    axis.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axis.set_yticks(range(len(tasks)), tasks)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("length in tokens")
    trained = [index for index, length in enumerate(lengths) if length <= (trained_length or 0)]
    if trained and len(trained) < len(lengths):
        axis.axvline(trained[-1] + 0.5, color="#222222", linestyle="--", linewidth=1.4)
    if trained_length and len(trained) < len(lengths):
        beyond = "" if trained else "; every length here is beyond that"
        axis.set_title(f"trained to {trained_length:,} tokens{beyond}", fontsize=8, loc="right")
    figure.supxlabel(LEGEND, fontsize=7, color="#444444")
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(
        image, ax=axis, fraction=0.04, pad=0.02, format=PercentFormatter(1, 0, "")
    )
    bar.set_label("score in per cent")
    save_png(figure, path, dpi=150)
