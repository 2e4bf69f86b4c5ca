"""`report.html` of a run: one file that shows all of it, and can be sent to somebody.

It holds its style and its pictures, asks nothing of the net and runs no script; whatever comes from
files is escaped (by Jinja). It follows the reader's light or dark theme.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ic.files.atomic_write import replacing
from ic.files.run_folder import RunFolder
from ic.run.report.contents import Contents, read_contents
from ic.run.report.curves import as_svg, draw_curves, save_curves


def write_report(
    run: RunFolder, results: Mapping[str, Any] | None = None, output: Path | None = None
) -> Path:
    """Write the report, and the curves as a picture beside the run's other files -> the report.

    Args:
        results: of a run that is just ending, whose `results.json` is not written yet.
        output: the file; by default `report.html` in the run's folder.

    Raises:
        UsageError: the folder holds no run.
        ValueError: a file in it is damaged.
        OSError: something cannot be read or written.
    """
    contents = read_contents(run, results)
    figure = draw_curves(contents.rows)
    if figure is not None:
        save_curves(figure, run.curves)
    path = output or run.report
    page = _page(contents, None if figure is None else as_svg(figure))
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _page(contents: Contents, curves: str | None) -> str:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    template = environment.get_template("report.html.jinja")
    style = (here / "report.css").read_text(encoding="utf-8")
    return template.render(report=contents, curves=curves, style=style)


def _data_uri(picture: Path) -> str:
    """A PNG as the address of an image; empty where the file is not there."""
    if not picture.is_file():
        return ""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
