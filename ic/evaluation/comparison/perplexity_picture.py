"""By how much the perplexity of B lies above or below that of A, by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.evaluation.comparison.losses import Curve

# Okabe and Ito's blue, vermilion and green, with marks that differ as well.
_STYLES = (("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", ":", "D"))


def draw_change(curves: Sequence[Curve], path: Path, *, first: str, second: str) -> None:
    """Draw the PNG file `path`: a panel for each length, and in it a curve for each way of reading,
    with bars of the 95 % intervals.

    Args:
        first, second: names of A and B.
    """
    lengths = sorted({curve.length_tokens for curve in curves})
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    figure = new_figure(max(6.4, 1.2 + 4.6 * len(lengths)), 4.4)
    axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axis, length in zip(axes, lengths, strict=True):
        axis.axhline(0, color="#222222", linewidth=1)
        for curve in (each for each in curves if each.length_tokens == length):
            colour, line, mark = _STYLES[tasks.index(curve.task) % len(_STYLES)]
            # A band stands at the middle of its positions, by their ratio.
            x = [math.sqrt(band.from_token * max(1, band.to_token - 1)) for band in curve.bands]
            y = [100 * math.expm1(band.difference) for band in curve.bands]
            axis.plot(x, y, line, marker=mark, markersize=4, color=colour, label=curve.task)
            for at, band in zip(x, curve.bands, strict=True):
                if band.low_95 is not None and band.high_95 is not None:
                    ends = [100 * math.expm1(end) for end in (band.low_95, band.high_95)]
                    axis.plot([at, at], ends, color=colour, linewidth=1.5)
        axis.set_xscale("log", base=2)
        first_token = min(band.from_token for each in curves for band in each.bands)
        powers = range(math.ceil(math.log2(first_token)), math.floor(math.log2(length)) + 1)
        ticks = [2**power for power in powers][:: -max(1, math.ceil(len(powers) / 8))]
        axis.set_xticks(ticks, [tokens(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        documents = next(each.whole.n for each in curves if each.length_tokens == length)
        axis.set_xlabel(f"position in tokens ({documents} documents of {tokens(length)})")
    axes[0].set_ylabel("perplexity of B against A in per cent\nB better  ←     →  A better")
    if len(tasks) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel(
        "bars: 95 % intervals (paired bootstrap over documents)", fontsize=7, color="#444444"
    )
    figure.suptitle(f"A: {first}   B: {second}", fontsize=10)
    save_png(figure, path, dpi=150)
