"""The documents' diagrams: drawn by the code as they lie there, and legible."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from ic.studies.tables.diagrams import DIAGRAMS

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
WIDEST = 6.5  # pixels of a character in 13 px sans-serif, on average


@pytest.mark.parametrize("name", DIAGRAMS)
def test_the_file_is_what_the_code_draws(name: str) -> None:
    drawn = (ROOT / "docs" / "images" / name).read_text()
    assert drawn == DIAGRAMS[name](), "run make tables"


@pytest.mark.parametrize("name", DIAGRAMS)
def test_words_fit_their_boxes_and_nothing_leaves_the_picture(name: str) -> None:
    root = ElementTree.fromstring(DIAGRAMS[name]())
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert root.find(f"{SVG}title") is not None
    boxes = [
        tuple(float(each.get(key, 0)) for key in ("x", "y", "width", "height"))
        for each in root.iter(f"{SVG}rect")
    ]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    inside = boxes[1:]  # the first is the ground
    held = 0
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        length = len("".join(text.itertext())) * WIDEST
        around = [b for b in inside if b[0] <= x <= b[0] + b[2] and b[1] <= y <= b[1] + b[3]]
        assert len(around) <= 1
        for _, _, box, _ in around:
            assert length <= box, "".join(text.itertext())
            held += 1
    assert held >= len(inside)
    for n, (x, y, w, h) in enumerate(inside):
        for a, b, c, d in inside[n + 1 :]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


@pytest.mark.parametrize("name", DIAGRAMS)
def test_they_load_nothing_and_follow_the_theme(name: str) -> None:
    text = DIAGRAMS[name]().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text
    assert "prefers-color-scheme:dark" in text
