"""A parity report as one picture: perplexity by length, KL by position, bytes of the caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic.conversion.parity.texts import BUCKET, WHOLE
from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
# Okabe and Ito's blue, vermilion and bluish green, told apart by every kind of colour vision; lines
# and marks differ in shape as well.
_COLORS = {"original": "#0072B2", "converted": "#D55E00"}
_LINES = {"original": ("-", "o"), "converted": ("--", "s")}
_GREEN = "#009E73"
# KL below it is rounding, and stands on it.
_LEAST_KL = 1e-8


def draw(rows: Sequence[Row], path: Path, *, title: str) -> bool:
    """Draw the PNG file `path`: a panel for each part that was measured -> whether there is any."""
    texts = [row for row in rows if row["what"] == "logits"]
    caches = [row for row in rows if row["what"] == "cache" and row["by"] == "context"]
    buckets = [row for row in texts if row["position"] == BUCKET and row["kl"] is not None]
    panels = [_perplexity, _kl] if texts else []
    panels += [_cache] if caches else []
    if not panels:
        return False
    figure = new_figure(1.0 + 4.4 * len(panels), 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        given = {_perplexity: texts, _kl: buckets, _cache: caches}[panel]
        panel(axis, given)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path, dpi=150)
    return True


def _perplexity(axis: Axes, rows: Sequence[Row]) -> None:
    whole = [row for row in rows if row["position"] == WHOLE]
    values = []
    for name in ("original", "converted"):
        of_side = [row for row in whole if row[f"perplexity_{name}"] is not None]
        x = [row["length_tokens"] for row in of_side]
        y = [row[f"perplexity_{name}"] for row in of_side]
        values += y
        line, marker = _LINES[name]
        # The converted model's marks are hollow, so that equal ones are both seen.
        face = "white" if name == "converted" else _COLORS[name]
        axis.plot(
            *(x, y, line),
            marker=marker,
            markersize=8 if name == "converted" else 5,
            markerfacecolor=face,
            color=_COLORS[name],
            zorder=2 if name == "converted" else 3,
            label=name,
        )
    for row in whole:
        if row["ratio"] is not None:
            axis.annotate(
                f"{100 * (row['ratio'] - 1):+.3g} %",
                (row["length_tokens"], row["perplexity_converted"]),
                textcoords="offset points",
                xytext=(0, 9),
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
    _token_axis(axis, [row["length_tokens"] for row in whole])
    if max(values) > 3 * min(values):
        _log_axis(axis)
    documents = sorted({row["n"] for row in whole})
    several = " to ".join(map(str, documents[:: max(1, len(documents) - 1)]))
    axis.set_xlabel(f"length in tokens ({several} documents of each)")
    axis.set_ylabel("perplexity")
    axis.set_title("perplexity by length, and its paired change", fontsize=9)
    axis.margins(0.12, 0.2)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _kl(axis: Axes, rows: Sequence[Row]) -> None:
    longest = max(row["length_tokens"] for row in rows)
    curve = [row for row in rows if row["length_tokens"] == longest]
    # A bucket stands at the middle of its positions, by their ratio.
    x = [math.sqrt(row["from_token"] * max(1, row["to_token"] - 1)) for row in curve]
    for name, label, color, line, marker in (
        ("kl_p99", "99th percentile", _COLORS["converted"], "--", "s"),
        ("kl", "mean", _COLORS["original"], "-", "o"),
        ("kl_median", "median", _GREEN, ":", "^"),
    ):
        y = [max(_LEAST_KL, row[name]) for row in curve]
        axis.plot(x, y, line, marker=marker, markersize=4, color=color, label=label)
    if curve[0]["kl_low_95"] is not None:
        low = [max(_LEAST_KL, row["kl_low_95"]) for row in curve]
        high = [max(_LEAST_KL, row["kl_high_95"]) for row in curve]
        axis.fill_between(x, low, high, color=_COLORS["original"], alpha=0.15, linewidth=0)
    _token_axis(axis, [2**power for power in range(1, math.floor(math.log2(longest)) + 1)])
    _log_axis(axis)
    if all(row["kl_p99"] <= _LEAST_KL for row in curve):
        axis.set_ylim(_LEAST_KL / 10, 1)
        axis.text(0.5, 0.5, "0 everywhere", transform=axis.transAxes, ha="center")
    axis.set_xlabel(f"position in tokens ({curve[0]['n']} documents of {tokens(longest)})")
    axis.set_ylabel("nats per token")
    axis.set_title("KL(original || converted) by position", fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _cache(axis: Axes, rows: Sequence[Row]) -> None:
    last = rows[-1]
    names = ("original", "converted")
    kib = [last[f"bytes_per_token_{name}"] / 2**10 for name in names]
    hatches = ("", "///")
    axis.bar(
        *(names, kib),
        width=0.55,
        color=[_COLORS[name] for name in names],
        edgecolor="white",
        hatch=hatches,
    )
    for place, name in enumerate(names):
        lines = [f"{kib[place]:,.2f} KiB a token"]
        lines += [
            f"{tokens(row['context_tokens'])}: {size_text(row[f'bytes_{name}'])}" for row in rows
        ]
        axis.text(place, kib[place], "\n".join(lines), ha="center", va="bottom", fontsize=8)
    axis.set_ylim(0, max(kib) * 1.35)
    axis.set_ylabel("KiB per token, all layers")
    axis.set_title(f"cache by allocation, ratio {last['ratio']:.3g}", fontsize=9)
    axis.grid(axis="y", alpha=0.25)


def size_text(nbytes: float) -> str:
    """`368 MiB`, `5.63 GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            value = nbytes / size
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return f"{nbytes:,.0f} bytes"


def _log_axis(axis: Axes) -> None:
    """Values on a log axis, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 1e4 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _token_axis(axis: Axes, ticks: Sequence[int]) -> None:
    """A log2 axis with at most eight round ticks."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axis.set_xscale("log", base=2)
    step = max(1, math.ceil(len(ticks) / 8))
    axis.set_xticks(list(ticks)[::-1][::step])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
    axis.xaxis.set_minor_formatter(NullFormatter())
