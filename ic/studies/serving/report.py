"""The table and the picture of a serving benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ic.display.figure import new_figure, save_png
from ic.display.numbers import percent, tokens
from ic.display.table import print_table

_DPI = 120
# Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A line per cell; what no cell has is left out. Cells without a row are named below."""
    measured = [row for row in rows if "error" not in row]
    every = {head: [show(row) for row in measured] for head, show in _COLUMNS.items()}
    known = {head: texts for head, texts in every.items() if set(texts) - {"-"}}
    if known:
        lines = list(zip(*known.values(), strict=True))
        print_table(list(known), lines, title="serving", fixed=2, console=console)
    for row in rows:
        if "error" in row:
            console.print(f"{said(row)}: {row['error']}", highlight=False, soft_wrap=True)


def said(row: dict[str, Any]) -> str:
    """The name of a cell."""
    at_once = "1 request" if row["batch"] == 1 else f"{row['batch']} requests"
    return f"{at_once} at {tokens(row['context_tokens'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _figures(key: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{scale * row[key]:.3g}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "context": lambda row: tokens(row["context_tokens"]),
    "batch": lambda row: str(row["batch"]),
    "first s p50": _figures("time_to_first_token_p50_s"),
    "p95": _figures("time_to_first_token_p95_s"),
    "ms/token p50": _figures("time_per_output_token_p50_s", 1e3),
    "p95 ": _figures("time_per_output_token_p95_s", 1e3),
    "decode/s": lambda row: _number(row["decode_tokens_per_s"]),
    "of bound": lambda row: percent(row.get("share_of_bound")),
    "prefill/s": lambda row: _number(row["prefill_tokens_per_s"]),
    "MFU": lambda row: percent(row.get("prefill_mfu")),
    "prefix": lambda row: percent(row["prefix_hit_rate"] or None),
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Decode throughput and time to the first token over the context, a line per batch."""
    measured = [row for row in rows if "error" not in row]
    if not measured:
        return
    from matplotlib.ticker import LogLocator  # late, as `new_figure` does it

    figure = new_figure(11, 4.4)
    speed, wait = figure.subplots(1, 2)
    lengths = sorted({row["context_tokens"] for row in measured})
    batches = sorted({row["batch"] for row in measured})
    for batch, colour in zip(batches, _COLOURS * len(batches), strict=False):
        of_batch = [row for row in measured if row["batch"] == batch]
        of_batch.sort(key=lambda row: row["context_tokens"])
        name = said(of_batch[0]).partition(" at ")[0]
        rated = [row for row in of_batch if row["decode_tokens_per_s"] is not None]
        x = [row["context_tokens"] for row in rated]
        y = [row["decode_tokens_per_s"] for row in rated]
        speed.plot(x, y, marker="o", color=colour, label=name)
        bound = [row for row in rated if "bound_tokens_per_s" in row]
        if bound:
            speed.plot(
                [row["context_tokens"] for row in bound],
                [row["bound_tokens_per_s"] for row in bound],
                marker="_",
                markersize=12,
                linestyle="--",
                color=colour,
                alpha=0.6,
            )
        x = [row["context_tokens"] for row in of_batch]
        middle = [row["time_to_first_token_p50_s"] for row in of_batch]
        late = [row["time_to_first_token_p95_s"] for row in of_batch]
        wait.plot(x, middle, marker="o", color=colour, label=name)
        wait.vlines(x, middle, late, color=colour, alpha=0.6)
    has_bound = any("bound_tokens_per_s" in row for row in measured)
    speed.set_title("decode" + (", dashed: memory read once per step" if has_bound else ""))
    speed.set_ylabel("tokens per second, all requests")
    wait.set_title("time to the first token (median; line up to p95)")
    wait.set_ylabel("seconds")
    for axes in (speed, wait):
        axes.set_xscale("log", base=2)
        if any(len(line.get_ydata()) for line in axes.lines):  # else there is no logarithm
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xticks(lengths, [tokens(length) for length in lengths])
        axes.minorticks_off()
        if len(lengths) == 1:
            axes.set_xlim(lengths[0] / 2, lengths[0] * 2)
        axes.set_xlabel("tokens of prompt and answer")
        axes.grid(alpha=0.3)
        axes.legend()
    save_png(figure, path, _DPI)
