"""What an analysis leaves: a results file, a page of words and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ic.display.figure import new_figure, save_png
from ic.display.markdown import markdown
from ic.files.atomic_write import replacing
from ic.files.results import write_results
from ic.files.run_folder import ExperimentFolder
from ic.serving.ab.analysis import Compared
from ic.serving.ab.outcomes import Log
from ic.serving.ab.words import HEADS, lines, notes, sentences

# Okabe and Ito's blue, vermilion and green, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def write_report(
    log: Log,
    compared: Sequence[Compared],
    folder: ExperimentFolder,
    config: dict[str, Any],
    alpha: float,
) -> None:
    """Write the three files, each whole."""
    said = [*sentences(compared, log.versions[0]), *notes(log, compared, alpha)]
    if compared:
        draw(compared, folder.picture)
    pages = [
        f"# {', '.join(log.versions[1:])} against {log.versions[0]}",
        *said,
        "\n".join(markdown(HEADS, lines(compared), left=2, text=("better",))),
        *([f"![differences over the requests]({folder.picture.name})"] if compared else []),
    ]
    with replacing(folder.document) as partial:
        partial.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    write_results(folder.results, config, [each.columns for each in compared], public=True)


def draw(compared: Sequence[Compared], path: Path) -> None:
    """A panel for each measure: difference and confidence sequence over the requests."""
    measures = list(dict.fromkeys(each.measure.name for each in compared))
    versions = list(dict.fromkeys(each.version for each in compared))
    figure = new_figure(1.0 + 4.2 * len(measures), 3.8)
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        axis.axhline(0, color="#222222", linewidth=1)
        widest = 0.0
        for each in (each for each in compared if each.measure.name == measure):
            colour = _COLOURS[versions.index(each.version) % len(_COLOURS)]
            at, value, half = each.curve
            known = np.isfinite(half)
            low, high = value[known] - half[known], value[known] + half[known]
            scale = np.expm1 if each.measure.ratio else np.asarray
            value, low, high = (100 * scale(part) for part in (value[known], low, high))
            axis.plot(at[known], value, color=colour, label=each.version)
            axis.fill_between(at[known], low, high, color=colour, alpha=0.2, linewidth=0)
            if known.any():
                late = slice(len(low) // 20, None)
                widest = max(widest, float(np.abs([low[late], high[late]]).max()))
        if widest:
            axis.set_ylim(-1.05 * widest, 1.05 * widest)
        axis.set_title(measure)
        axis.set_xlabel("requests")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("difference from the control, points or %")
    axes[0].legend()
    save_png(figure, path, dpi=120)
