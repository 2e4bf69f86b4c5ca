"""What `ablation` shows: a line a run, the table and the plot. Accuracy is on synthetic text."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.display.table import print_table

Row = dict[str, Any]
# Okabe and Ito's colours without the yellow, which is faint on white, and two more; the marker
# differs as well.
_COLORS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#7F7F7F",
    "#8B4513",
)
_MARKERS = "os^DvPX*<>"


def ablation_line(row: Row) -> str:
    """One line of progress."""
    title = f"{row['variant']}, seed {row['seed']}"
    if row["status"] == "failed":
        return f"{title}: failed, {row['reason']}"
    parts = [f"{tokens(row['context_lengths'][-1]['context_length_tokens'])} trained"]
    for task in dict.fromkeys(cell["task"] for cell in row["passkey"]):
        shown = (
            f"{tokens(cell['length_tokens'])} {cell['correct']}/{cell['n']}"
            for cell in row["passkey"]
            if cell["task"] == task
        )
        parts.append(f"{task} {' '.join(shown)}")
    return f"{title}: {row['steps']:,} steps, {'; '.join(parts)}"


def accuracies(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[int, float]]:
    """(variant, task, length in tokens) -> accuracy of each seed, depths and fillers pooled."""
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        for cell in row.get("passkey", []):
            key = (row["variant"], cell["task"], cell["length_tokens"])
            found.setdefault(key, {})[row["seed"]] = cell["accuracy"]
    return found


def ablation_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table: a line a variant and task."""
    found = accuracies(rows)
    tasks = list(dict.fromkeys(task for _, task, _ in found))
    lengths = sorted({length for _, _, length in found})
    heads = ["variant", "task", "seeds", "trained to", "after", *map(tokens, lengths)]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        here = [row for row in rows if row["variant"] == variant]
        measured = [row for row in here if row["status"] == "measured"]
        seeds = f"{len(measured)}" + (f" of {len(here)}" if len(measured) < len(here) else "")
        for task in tasks if measured else []:
            shown = [found.get((variant, task, length), {}).values() for length in lengths]
            lines.append([variant, task, seeds, *_trained(measured), *map(_percent, shown)])
    return heads, lines


def training_share(rows: list[Row], max_time_s: int | None) -> str:
    """What every run was given: `80 s` of wall clock, or `300 steps`."""
    if max_time_s is not None:
        return f"{max_time_s} s"
    return (
        " or ".join(f"{n:,}" for n in sorted({row["steps"] for row in rows if "steps" in row}))
        + " steps"
    )


def show_ablation(rows: list[Row], max_time_s: int | None, console: Console) -> None:
    """Exact answers in per cent, mean and range over the seeds."""
    heads, lines = ablation_cells(rows)
    print_table(
        heads,
        lines,
        fixed=2,
        title=f"Exact answers on synthetic text, {training_share(rows, max_time_s)} of training",
        caption="per cent: mean over seeds (lowest-highest)",
        ends=[
            number
            for number, (line, after) in enumerate(zip(lines, [*lines[1:], [""]], strict=True))
            if line[0] != after[0]
        ],
        console=console,
    )


def draw_ablation(rows: list[Row], path: Path, max_time_s: int | None) -> None:
    """Accuracy by length, a panel a task: a marker a seed, a bar at the mean of a variant."""
    from matplotlib.lines import Line2D

    found = accuracies(rows)
    if not found:
        return
    variants = list(dict.fromkeys(variant for variant, _, _ in found))
    tasks = list(dict.fromkeys(task for _, task, _ in found))
    lengths = sorted({length for _, _, length in found})
    styles = [
        (_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for i in range(len(variants))
    ]
    figure = new_figure(14, 1.2 + 3.1 * len(tasks))
    panels = figure.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.9 / len(variants)
    for axis, task in zip(panels, tasks, strict=True):
        for x in range(0, len(lengths), 2):
            axis.axvspan(x - 0.5, x + 0.5, color="#F3F4F6", zorder=0)
        for i, (variant, (color, marker)) in enumerate(zip(variants, styles, strict=True)):
            left = -0.45 + i * width
            for x, length in enumerate(lengths):
                by_seed = found.get((variant, task, length), {})
                if not by_seed:
                    continue
                y = [100 * by_seed[seed] for seed in sorted(by_seed)]
                step = 0.8 * width / len(y)
                at = [x + left + 0.1 * width + step * (k + 0.5) for k in range(len(y))]
                axis.plot(at, y, color=color, marker=marker, markersize=4.5, linestyle="none")
                mean = sum(y) / len(y)
                ends = [x + left + 0.12 * width, x + left + 0.88 * width]
                axis.plot(ends, [mean, mean], color=color, linewidth=1.5)
        axis.set_ylim(-4, 104)
        axis.set_yticks(range(0, 101, 25), [f"{y} %" for y in range(0, 101, 25)])
        axis.grid(axis="y", color="#D5D9E0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xlim(-0.5, len(lengths) - 0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel(f"{task}\nexact answers")
    panels[-1].set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    panels[-1].set_xlabel("prompt length in tokens")
    handles = [
        Line2D([], [], linestyle="none", color=color, marker=marker, label=variant)
        for variant, (color, marker) in zip(variants, styles, strict=True)
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(
        f"Synthetic passkeys after {training_share(rows, max_time_s)} of training; "
        "one marker per seed, a bar at their mean",
        fontsize=11,
    )
    save_png(figure, path, dpi=130)


def _trained(measured: list[Row]) -> list[str]:
    """Longest length trained, and when it was reached if it is the same for every seed."""
    last = [row["context_lengths"][-1] for row in measured]
    lengths = sorted({reached["context_length_tokens"] for reached in last})
    if len(lengths) > 1:
        return [f"{tokens(lengths[0])}-{tokens(lengths[-1])}", "-"]
    seconds = [reached["elapsed_s"] for reached in last]
    return [tokens(lengths[0]), f"{_spread(seconds)} s"]


def _percent(shares: Collection[float]) -> str:
    return _spread([100 * share for share in shares]) if shares else "-"


def _spread(values: list[float]) -> str:
    mean, low, high = (_number(x) for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
