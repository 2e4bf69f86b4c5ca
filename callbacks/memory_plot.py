"""Stacked bars of a memory profile: one bar a phase, one colour a kind of memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ic.display.figure import new_figure, save_png

# Weights, what training adds to them, what a batch adds, and what is not ours: four families of
# colour.
COLORS = {
    "parameters": "#2E4A7D",
    "gradients": "#5B8DB8",
    "optimizer": "#9CC3D9",
    "cache": "#0CD79F",
    "activations": "#EBB839",
    "other": "#C9C9C9",
}


# The order in which a run goes through them; phases that other callbacks named follow.
ORDER = ("setup", "forward", "backward", "optimizer_step", "validation")


def draw_phases(phases: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a PNG of `memory.json`'s phases, first phase on top.

    The black line is the phase's peak. It can lie left of a bar's end: parts are measured where a
    phase begins and ends, and the peak need not hold all of them at once.
    """
    names = [n for n in ORDER if n in phases] + [n for n in phases if n not in ORDER]
    has_reserved = any(phase["peak_reserved_bytes"] is not None for phase in phases.values())
    largest = max((_bar_end(phase) for phase in phases.values()), default=1)
    unit, scale = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    figure = new_figure(9, 1.6 + 0.5 * len(phases))
    axes = figure.add_subplot()
    for row, phase in enumerate(phases[name] for name in names):
        left = 0.0
        for kind, color in COLORS.items():
            width = phase["split_bytes"][kind] / scale
            axes.barh(
                row, width, left=left, height=0.62, color=color, label=kind if row == 0 else None
            )
            left += width
        peak = phase["split_of_bytes"] / scale
        axes.plot([peak, peak], [row - 0.36, row + 0.36], color="black", linewidth=1.5)
        end = max(left, _bar_end(phase) / scale)
        axes.annotate(f" {peak:,.2f}", (end, row), va="center", fontsize=9)
        reserved = phase["peak_reserved_bytes"]
        if reserved is not None:
            axes.plot(reserved / scale, row, marker="|", color="#F0496E", markersize=16)
    axes.set_yticks(range(len(phases)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    reserved_note = "; red line: reserved by the allocator" if has_reserved else ""
    axes.set_xlabel(f"{unit}; black line and number: peak{reserved_note}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=len(COLORS), loc="outside lower center", frameon=False)
    save_png(figure, path, dpi=150)


def _bar_end(phase: Mapping[str, Any]) -> int:
    return max(sum(phase["split_bytes"].values()), phase["peak_reserved_bytes"] or 0)
