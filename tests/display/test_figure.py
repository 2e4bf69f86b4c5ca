"""A plot is complete or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ic.display.figure import new_figure, save_png


def test_a_plot_has_its_size_and_what_was_drawn(tmp_path: Path) -> None:
    figure = new_figure(3, 2)
    figure.add_subplot().barh([0], [1], color="#FF0000")
    save_png(figure, tmp_path / "below" / "plot.png", dpi=50)
    pixels = np.asarray(Image.open(tmp_path / "below" / "plot.png").convert("RGB"))
    assert pixels.shape == (100, 150, 3)
    assert ((pixels == (255, 0, 0)).all(-1)).mean() > 0.2


def test_a_plot_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"before")
    figure = new_figure(3, 2)
    figure.suptitle("$broken{$")  # not TeX: found while it is drawn
    with pytest.raises(ValueError, match="broken"):
        save_png(figure, path, dpi=50)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
