"""What a run logged while it trained, as a picture of several panels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic.display.figure import new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN_COLOR, VAL_COLOR, GRID_COLOR = "#4C8BC9", "#D9596F", "#999999"
# Text and axes. In an SVG they become `currentColor`, which follows a page's light or dark theme.
_INK = "#0a0b0c"
_COLUMNS = 2
_WHOLE_FROM = 2000  # axes that reach it show whole numbers with their thousands set apart


@dataclass(frozen=True)
class Panel:
    """One panel: a title that names the unit, and the metrics in it by their labels.

    Attributes:
        log2: lengths in tokens, which double.
    """

    title: str
    metrics: Mapping[str, str]
    log2: bool = False


PANELS = (
    Panel("loss", {"training": "train/loss", "validation": "val/loss"}),
    Panel(
        "share of answer tokens that are right",
        {"training": "train/answer_accuracy", "validation": "val/answer_accuracy"},
    ),
    Panel("perplexity", {"training": "train/perplexity", "validation": "val/perplexity"}),
    Panel(
        "share of pairs whose better answer is likelier",
        {"training": "train/rewards/accuracies", "validation": "val/rewards/accuracies"},
    ),
    Panel("tokens per second, all devices", {"training": "train/tokens_per_s"}),
    Panel("MFU, share of the devices' peak", {"training": "train/mfu"}),
    Panel("context length in tokens", {"training": "train/context_length"}, log2=True),
    Panel("learning rate", {"training": "lr"}),
    Panel("share of time spent waiting for data", {"training": "train/data_wait_share"}),
    Panel("peak memory of a step in GiB", {"training": "memory/run_peak_gib"}),
)


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A panel for each of `PANELS` that was logged at two steps or more; None without any.

    Args:
        rows: of `metrics.csv`.
    """
    found = [
        (panel, lines)
        for panel in PANELS
        if max(map(len, (lines := _lines(rows, panel)).values()), default=0) > 1
    ]
    if not found:
        return None
    num_rows = -(-len(found) // _COLUMNS)
    figure = new_figure(9.6, 0.4 + 2.4 * num_rows)
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    for place, (panel, lines) in enumerate(found):
        axis = figure.add_subplot(num_rows, _COLUMNS, place + 1)
        for label, points in lines.items():
            color = VAL_COLOR if label == "validation" else TRAIN_COLOR
            axis.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.6)
        _dress(axis, panel, several=len(lines) > 1)
    return figure


def save_curves(figure: Figure, path: Path) -> None:
    """Write the picture as a PNG."""
    save_png(figure, path, dpi=130)


def as_svg(figure: Figure) -> str:
    """The picture as an element `<svg>` to stand in a page: its ink is the page's text colour.

    Equal figures give equal text.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _lines(rows: Sequence[Mapping[str, Any]], panel: Panel) -> dict[str, list[tuple[int, float]]]:
    lines = {
        label: [(int(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
        for label, metric in panel.metrics.items()
    }
    return {label: points for label, points in lines.items() if points}


def _dress(axis: Axes, panel: Panel, several: bool) -> None:
    axis.set_title(panel.title, loc="left", fontsize=10, color=_INK)
    axis.set_xlabel("optimizer step", fontsize=8, color=_INK)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.grid(axis="y", color=GRID_COLOR, alpha=0.35, linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_INK)
    if panel.log2:
        axis.set_yscale("log", base=2)
    large = [axis.yaxis] if panel.log2 or axis.get_ylim()[1] >= _WHOLE_FROM else []
    for each in [*large, *([axis.xaxis] if axis.get_xlim()[1] >= _WHOLE_FROM else [])]:
        each.set_major_formatter("{x:,.0f}")
    if several:
        axis.legend(frameon=False, fontsize=8, labelcolor=_INK)
