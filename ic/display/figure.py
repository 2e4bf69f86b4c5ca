"""Plots without a screen, saved whole."""

from __future__ import annotations

import struct
import zlib
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


def add_comment(path: Path, comment: str) -> None:
    """Add a line of ASCII to a PNG file as its text chunk `Comment`, before the closing chunk."""
    data = path.read_bytes()
    body = b"tEXtComment\0" + comment.encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end = data.rindex(b"IEND") - 4
    with replacing(path) as partial:
        partial.write_bytes(data[:end] + chunk + data[end:])
