"""What the picture of a memory profile shows: bars, peaks, names and unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from ic.callbacks.memory_plot import COLORS, draw_phases

GIB, MIB = 2**30, 2**20


def phase(peak: float, reserved: float | None, *parts: float, unit: int = GIB) -> dict[str, Any]:
    return {
        "split_bytes": {kind: n * unit for kind, n in zip(COLORS, parts, strict=True)},
        "split_of_bytes": peak * unit,
        "peak_reserved_bytes": None if reserved is None else reserved * unit,
    }


def bars(figure: Figure) -> dict[str, list[tuple[str, float, float]]]:
    """Each bar's pieces as (colour, begin, width), by the name beside it."""
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    found: dict[str, list[tuple[str, float, float]]] = {name: [] for name in names}
    for piece in axes.patches:
        assert isinstance(piece, Rectangle)
        row = round(piece.get_y() + piece.get_height() / 2)
        found[names[row]].append(
            (to_hex(piece.get_facecolor()).upper(), piece.get_x(), piece.get_width())
        )
    return found


def test_parts_and_peaks(tmp_path: Path, figures: list[Figure]) -> None:
    phases = {
        "passkey": phase(3.0, 5.0, 1, 0, 0, 2, 0, 0.5),
        "optimizer_step": phase(9.0, 10.0, 1, 2, 4, 0, 2, 0),
        "forward": phase(8.0, 9.5, 1, 2, 4, 0, 1, 0),
    }
    draw_phases(phases, "mla_tiny on one GPU", tmp_path / "memory.png")
    (figure,) = figures
    (axes,) = figure.axes
    # In the order of a run, the first on top.
    shown = bars(figure)
    assert list(shown) == ["forward", "optimizer step", "passkey"]
    assert axes.yaxis_inverted()
    for name, pieces in shown.items():
        parts = phases[name.replace(" ", "_")]["split_bytes"]
        assert [(color, width) for color, _, width in pieces] == [
            (COLORS[kind], nbytes / GIB) for kind, nbytes in parts.items()
        ]
        ends = [begin + width for _, begin, width in pieces]
        assert [begin for _, begin, _ in pieces] == [0, *ends[:-1]]
    black = [line.get_xdata()[0] for line in axes.lines if line.get_color() == "black"]
    red = [float(line.get_xdata()[0]) for line in axes.lines if line.get_color() == "#F0496E"]
    assert (black, red) == ([8, 9, 3], [9.5, 10, 5])
    assert [text.get_text().strip() for text in axes.texts] == ["8.00", "9.00", "3.00"]
    assert axes.get_title(loc="left") == "mla_tiny on one GPU"
    assert (
        axes.get_xlabel() == "GiB; black line and number: peak; red line: reserved by the allocator"
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(COLORS)
    # The colours of a bar's pieces are in the file, the largest more often than the smallest.
    pixels = imread(tmp_path / "memory.png")[..., :3].reshape(-1, 3)
    share = {
        kind: (
            abs(pixels - [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]).max(1) < 0.01
        ).mean()
        for kind, color in COLORS.items()
    }
    assert share["optimizer"] > share["gradients"] > share["parameters"] > share["other"] > 0.005


def test_small_profiles_are_in_mib(tmp_path: Path, figures: list[Figure]) -> None:
    draw_phases(
        {"setup": phase(300, None, 200, 0, 0, 0, 0, 90, unit=MIB)}, "", tmp_path / "memory.png"
    )
    (figure,) = figures
    (axes,) = figure.axes
    assert [width for _, _, width in bars(figure)["setup"]] == pytest.approx([200, 0, 0, 0, 0, 90])
    assert axes.get_xlabel() == "MiB; black line and number: peak"
