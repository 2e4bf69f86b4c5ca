"""The notebooks run from top to bottom, and say and show what they hold."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))


def said(notebook: Any) -> list[str]:
    """What the cells print and return as text, without the warnings of libraries."""
    found = []
    for cell in notebook.cells:
        printed = ""  # which arrives in one piece or in several
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            if output.get("name") == "stdout":
                printed += output.text
            elif "text/plain" in output.get("data", {}) and "image/png" not in output.data:
                found.append(output.data["text/plain"])
        if printed:
            found.append(printed)
    return found


def pictures(notebook: Any) -> list[tuple[int, int]]:
    """Width and height in pixels of the pictures."""
    sizes = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                sizes.append(struct.unpack(">II", base64.b64decode(png)[16:24]))
    return sizes


# Of published results; the others compute what they show.
PUBLISHED = {"cache_arithmetic", "comparing_two_checkpoints", "reading_a_heatmap"}


def test_five_are_there() -> None:
    assert {file.stem for file in FILES} == {
        *PUBLISHED,
        "mla_from_the_formula",
        "converting_a_model",
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_says_what_it_holds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the kernel's own process
    monkeypatch.delenv("MPLBACKEND", raising=False)  # which a verb sets in this one
    stored = nbformat.read(file, as_version=4)
    run = nbformat.read(file, as_version=4)
    for cell in run.cells:
        cell.outputs = []
    nbclient.NotebookClient(
        run, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(file.parent)}}
    ).execute()
    assert said(run) == said(stored) != []
    assert len(pictures(run)) == len(pictures(stored)) == 1
    assert all(width >= 500 and height >= 300 for width, height in pictures(run))
    assert file.stat().st_size < 300_000
    code = "".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    assert ('"../docs/results' in code) == (file.stem in PUBLISHED)
    assert ": False" not in "".join(said(stored))  # what a notebook holds equal is equal
    kept = [output for cell in stored.cells for output in cell.get("outputs", [])]
    assert all(output.get("name") != "stderr" for output in kept)
