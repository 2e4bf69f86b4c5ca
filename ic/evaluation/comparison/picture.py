"""A comparison as a dot plot: both scores on the left, their difference on the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.evaluation.comparison.compare import Comparison
from ic.evaluation.comparison.words import name_of
from ic.evaluation.statistics import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's orange and blue, which every kind of colour vision tells apart; the marks differ
# in shape as well.
COLORS = {"A": "#D55E00", "B": "#0072B2", None: "#777777"}
MARKS = {"A": "s", "B": "o", None: "D"}
_APART = 0.14  # of a line, between the dots of A and B
_LINE_INCHES = 0.3


def draw(comparison: Comparison, path: Path, *, first: str, second: str) -> None:
    """Draw the PNG file `path`: a line for each task and length, from above.

    Args:
        first, second: names of A and B.
    """
    groups = comparison.groups
    figure = new_figure(9.5, 2.0 + _LINE_INCHES * len(groups))
    scores, apart = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    for y, group in enumerate(groups):
        paired = group.paired
        for name, share, shift in (("A", paired.first, -_APART), ("B", paired.second, _APART)):
            low, high = wilson_interval(share * paired.n, paired.n)
            _dot(scores, name, share, low, high, y + shift)
        _dot(apart, group.better, paired.difference, paired.low_95, paired.high_95, y)
        if group.length_tokens is None and y:
            for axis in (scores, apart):
                axis.axhline(y - 0.5, color="#CCCCCC", linewidth=0.8)
    labels = []
    for group in groups:
        length = "" if group.length_tokens is None else f", {tokens(group.length_tokens)}"
        labels.append(f"{name_of(group, comparison)}{length} (n = {group.paired.n})")
    scores.set_yticks(range(len(groups)), labels)
    scores.set_ylim(len(groups) - 0.4, -0.6)
    scores.set_xlim(-4, 104)
    scores.set_xlabel("score in per cent, 95 % interval (Wilson)")
    apart.axvline(0, color="#222222", linewidth=1)
    widest = max(abs(100 * end) for g in groups for end in (g.paired.low_95, g.paired.high_95))
    apart.set_xlim(-widest * 1.15, widest * 1.15)
    apart.set_xlabel(
        "B - A in points, 95 % interval (paired bootstrap)\nA better  ←     →  B better"
    )
    for axis in (scores, apart):
        axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    for name, label in (("A", f"A: {first}"), ("B", f"B: {second}")):
        scores.plot([], [], MARKS[name], color=COLORS[name], label=label)
    apart.plot(
        [], [], MARKS[None], color=COLORS[None], markerfacecolor="white", label="cannot tell"
    )
    for axis in (scores, apart):
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=1,
            frameon=False,
            fontsize=8,
            handletextpad=0.3,
        )
    save_png(figure, path, dpi=150)


def _dot(axis: Axes, name: str | None, share: float, low: float, high: float, y: float) -> None:
    """A score with its interval, in per cent."""
    axis.plot([100 * low, 100 * high], [y, y], color=COLORS[name], linewidth=1.5)
    axis.plot(
        100 * share,
        y,
        MARKS[name],
        color=COLORS[name],
        markerfacecolor="white" if name is None else COLORS[name],
        markersize=6,
    )
