"""Perplexity by position as a picture: a curve for each task, a panel for each length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.evaluation.perplexity.curve import BUCKET, as_rows, task_name
from ic.evaluation.perplexity.grid import FULL, SLIDING
from ic.evaluation.suite import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion, told apart by every kind of colour vision, and by their lines.
_STYLES = {FULL: ("#0072B2", "-", "o"), SLIDING: ("#D55E00", "--", "s")}


def draw_curves(
    rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
) -> None:
    """Draw the PNG file `path`: position on a log2 axis, perplexity on a log axis, bands of the
    95 % intervals over documents.

    Args:
        trained_length: longest context in tokens that was trained, marked by a dashed line.
    """
    rows = [row for row in as_rows(rows) if row["position"] == BUCKET]
    lengths = sorted({row["length_tokens"] for row in rows})
    figure = new_figure(max(6.4, 1.2 + 4.6 * len(lengths)), 4.6)
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axis, length in zip(axes, lengths, strict=True):
        of_length = [row for row in rows if row["length_tokens"] == length]
        for task in dict.fromkeys(row["task"] for row in of_length):
            curve = [row for row in of_length if row["task"] == task]
            # A bucket stands at the middle of its positions, by their ratio.
            x = [math.sqrt(row["from_token"] * max(1, row["to_token"] - 1)) for row in curve]
            colour, line, marker = _STYLES[task]
            axis.plot(
                x,
                [row["perplexity"] for row in curve],
                line,
                marker=marker,
                markersize=4,
                color=colour,
                label=task_name(curve[0]),
            )
            if curve[0]["nll_low_95"] is not None:
                low = [math.exp(row["nll_low_95"]) for row in curve]
                high = [math.exp(row["nll_high_95"]) for row in curve]
                axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        first, last = min(row["from_token"] for row in of_length), length
        if trained_length and trained_length < last:
            axis.axvline(trained_length, color="#222222", linestyle=":", linewidth=1.4)
            axis.set_title(f"trained to {trained_length:,} tokens", fontsize=8, loc="right")
        _label(axis, first, last)
        documents = of_length[0]["n"]
        axis.set_xlabel(f"position in tokens ({documents} documents of {tokens(length)})")
    axes[0].set_ylabel("perplexity (log scale)")
    named = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    curves = {name: line for name, line in named.items() if not str(name).startswith("_")}
    # Beside the curves, which may run anywhere.
    figure.legend(
        curves.values(), curves.keys(), loc="outside right upper", fontsize=8, frameon=False
    )
    figure.supxlabel("bands: 95 % intervals over documents (Student)", fontsize=7, color="#444444")
    figure.suptitle(title, fontsize=11)
    save_png(figure, path, dpi=150)


def _label(axis: Axes, first: int, last: int) -> None:
    """Round positions below, plain numbers at the left, and a light grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    powers = range(math.ceil(math.log2(max(1, first))), math.floor(math.log2(last)) + 1)
    step = max(1, math.ceil(len(powers) / 8))
    axis.set_xticks([2**power for power in powers][::-1][::step])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:,.3g}" if y < 1000 else f"{y:,.0f}")
    )
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
