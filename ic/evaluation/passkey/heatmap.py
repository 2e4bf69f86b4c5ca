"""The needle heatmap as CSV and PNG, and the table for the terminal."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ic.evaluation.passkey.grid import CONTROL
from ic.evaluation.statistics import wilson_interval
from ic.files.atomic_write import replacing

# Red over yellow to green with 0 and 1 fixed, so that two heatmaps can be compared by eye.
COLORS = ("#F0496E", "#EBB839", "#0CD79F")


@dataclass(frozen=True)
class Pooled:
    """A shown cell: one length and depth of a task, fillers pooled."""

    task: str
    length_tokens: int
    depth: float
    n: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


def pool(rows: list[dict[str, Any]]) -> list[Pooled]:
    """Add up the fillers of each task, length and depth, in that order."""
    sums: dict[tuple[str, int, float], list[int]] = {}
    for row in rows:
        total = sums.setdefault((row["task"], row["length_tokens"], row["depth"]), [0, 0])
        total[0] += row["n"]
        total[1] += row["correct"]
    return [Pooled(*key, *total) for key, total in sorted(sums.items())]


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line a shown cell with its Wilson 95 % interval; depth `control` has no needle."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["task", "length_tokens", "depth", "n", "correct", "accuracy", "low_95", "high_95"]
        )
        for cell in pool(rows):
            low, high = wilson_interval(cell.correct, cell.n)
            depth = "control" if cell.depth == CONTROL else cell.depth
            writer.writerow(
                [cell.task, cell.length_tokens, depth, cell.n, cell.correct]
                + [f"{x:.4f}" for x in (cell.accuracy, low, high)]
            )


def write_png(
    rows: list[dict[str, Any]], path: Path, *, title: str, trained_length: int | None = None
) -> None:
    """Draw a panel a task: exact tokens on a log2 axis, depth from 0 at the top, n and interval in
    each cell.

    A dashed line marks the longest length that was trained; the strip below shows the control
    without needle.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    cells = pool(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({cell.length_tokens for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth != CONTROL})
    control = any(cell.depth == CONTROL for cell in cells)
    colors = LinearSegmentedColormap.from_list("retrieval", COLORS)

    height = 1.8 + len(tasks) * (0.42 * len(depths) + (0.75 if control else 0) + 0.7)
    figure = Figure(figsize=(max(6.4, 2.4 + 1.25 * len(lengths)), height), layout="constrained")
    FigureCanvasAgg(figure)
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
                grid[y, x] = cell.accuracy
                _annotate(axis, cell, (edges[x] * edges[x + 1]) ** 0.5, y)
        image = axis.pcolormesh(
            edges,
            np.arange(len(rows_of) + 1) - 0.5,
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
        axis.set_yticks(range(len(rows_of)), labels)
        axis.tick_params(length=0)
        axis.minorticks_off()
        axis.spines[:].set_visible(False)
        if trained_length and edges[0] < trained_length < edges[-1]:
            mark = _just_after(trained_length, lengths, edges)
            axis.axvline(mark, color="#222222", linestyle="--", linewidth=1.4)
            if panel == 0:
                axis.set_title(
                    f"dashed: trained to {trained_length:,} tokens", fontsize=8, loc="right"
                )
        if not is_control:
            axis.set_ylabel(
                f"{task}\ndepth of the needle" if len(tasks) > 1 else "depth of the needle"
            )
    axes[-1].set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes[-1].set_xlabel("prompt length in tokens")
    figure.suptitle(title, fontsize=11)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02)
    bar.set_label("share of exact answers")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def summary_table(rows: list[dict[str, Any]]) -> Table:
    """Accuracy by length with n, interval, worst depth, and the control, for the terminal."""
    table = Table(title="passkey retrieval, greedy decoding, synthetic data")
    for name in (
        "task",
        "tokens",
        "correct",
        "accuracy",
        "95 % interval",
        "worst cell",
        "no needle",
    ):
        table.add_column(name, justify="left" if name == "task" else "right")
    cells = pool(rows)
    for task, length in dict.fromkeys((cell.task, cell.length_tokens) for cell in cells):
        here = [c for c in cells if (c.task, c.length_tokens) == (task, length)]
        shown = [c for c in here if c.depth != CONTROL]
        control = [c for c in here if c.depth == CONTROL]
        n, correct = sum(c.n for c in shown), sum(c.correct for c in shown)
        low, high = wilson_interval(correct, n)
        worst = min(shown, key=lambda cell: cell.accuracy)
        table.add_row(
            task,
            f"{length:,}",
            f"{correct}/{n}",
            f"{100 * correct / n:.1f} %",
            f"{100 * low:.1f}-{100 * high:.1f} %",
            f"{worst.correct}/{worst.n} at {100 * worst.depth:g} %",
            f"{control[0].correct}/{control[0].n}" if control else "-",
        )
    return table


def _annotate(axis: Any, cell: Pooled, x: float, y: int) -> None:
    low, high = wilson_interval(cell.correct, cell.n)
    axis.text(
        x,
        y,
        f"{cell.correct}/{cell.n}  [{100 * low:.0f}-{100 * high:.0f}]",
        ha="center",
        va="center",
        fontsize=7,
        color="#222222",
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


def passkey_rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a shown cell, fillers pooled, with its Wilson 95 % interval."""
    rows: list[dict[str, Any]] = []
    for cell in pool(cells):
        low, high = wilson_interval(cell.correct, cell.n)
        rows.append(
            {
                "what": "passkey",
                "task": cell.task,
                "length_tokens": cell.length_tokens,
                "depth": "control" if cell.depth == CONTROL else cell.depth,
                "n": cell.n,
                "correct": cell.correct,
                "accuracy": cell.accuracy,
                "low_95": low,
                "high_95": high,
            }
        )
    return rows
