"""Plots without a screen, saved whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ic.files.atomic_write import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that makes room for its own labels."""
    # Takes a second to import, which help and the terminal's tables need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG file that is complete or absent, with so many pixels an inch."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)
