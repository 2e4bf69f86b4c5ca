"""What `scaling` shows: a line a case, the table and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ic.display.figure import new_figure, save_png
from ic.display.numbers import gib, percent
from ic.display.table import print_table

_COLUMNS = (
    "case",
    "GPUs",
    "context",
    "tokens/s",
    "step",
    "p10-p90",
    "MFU",
    "busy",
    "GiB",
    "ratio",
    "efficiency",
)


def scaling_line(row: dict[str, Any]) -> str:
    """One line of progress."""
    title = f"{row['name']}, {_gpus(row)}"
    if row["status"] != "measured":
        return f"{title}: {row['status']}, {row['reason']}"
    parts = [f"{row['tokens_per_s']:,.0f} tokens/s", f"{row['step_time_median_s']:.3f} s per step"]
    if row["mfu"] is not None:
        parts.append(f"MFU {_percent(row['mfu'])}")
    return f"{title}: {', '.join(parts)} ({row['wall_s']:.0f} s in all)"


def show_scaling(rows: list[dict[str, Any]], baseline: str, console: Console) -> None:
    """The measured rows: step times in s, peak memory of a GPU, tokens/s over the baseline's."""
    lines = []
    for row in rows:
        if row["status"] != "measured":
            continue
        peak, ratio = row["peak_bytes_per_gpu"], row["ratio_to_baseline"]
        lines.append(
            (
                row["name"],
                str(row["num_gpus"]),
                f"{row['context_length_tokens']:,}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['step_time_median_s']:.3f}",
                f"{row['step_time_p10_s']:.3f}-{row['step_time_p90_s']:.3f}",
                _percent(row["mfu"]),
                _percent(row["gpu_utilisation"]),
                gib(peak, unit=""),
                "-" if ratio is None else f"{ratio:.2f}",
                _percent(row["scaling_efficiency"]),
            )
        )
    print_table(
        _COLUMNS,
        lines,
        title="Training by strategy",
        caption=f"ratio: tokens/s over those of {baseline}",
        console=console,
    )


def draw_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens/s, and of MFU and GPU utilisation, a line a measured row."""
    shown = [row for row in rows if row["status"] == "measured"]
    if not shown:
        return
    figure = new_figure(12, 1.6 + 0.5 * len(shown))
    speed, share = figure.subplots(1, 2, sharey=True)
    y = list(range(len(shown)))
    speed.set_yticks(
        y,
        [f"{r['name']}\n{_gpus(r)}, {r['context_length_tokens']:,} tokens" for r in shown],
        fontsize=8,
    )
    speed.invert_yaxis()
    bars = speed.barh(y, [r["tokens_per_s"] for r in shown], color="#3B6FB6")
    speed.bar_label(bars, [f"{r['tokens_per_s']:,.0f}" for r in shown], padding=3, fontsize=8)
    speed.set_xlabel("tokens/s, all GPUs together")
    speed.margins(x=0.18)
    for offset, key, label, color in (
        (-0.2, "mfu", "MFU", "#0B9E78"),
        (0.2, "gpu_utilisation", "GPU utilisation (NVML: share of time with a kernel)", "#C9CED6"),
    ):
        have = [i for i in y if shown[i][key] is not None]
        values = [100 * shown[i][key] for i in have]
        bars = share.barh([i + offset for i in have], values, 0.38, color=color, label=label)
        share.bar_label(bars, [f"{value:.0f} %" for value in values], padding=3, fontsize=8)
    share.set_xlim(0, 112)
    share.set_xlabel("per cent")
    share.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    for axes in (speed, share):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Training by strategy, {shown[0]['device']}", fontsize=11)
    save_png(figure, path, dpi=130)


def _gpus(row: dict[str, Any]) -> str:
    return f"{row['num_gpus']} GPU{'s' * (row['num_gpus'] > 1)}"


def _percent(share: float | None) -> str:
    return percent(share, digits=1, sign="%")
