"""The picture of the losses: what it shows, and that it is there after a run and a resume."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ic.callbacks.loss_curve import TRAIN, VAL, draw_losses
from tests.conftest import SHORT

Run = Callable[..., int]
ROWS = [
    {"step": "0", TRAIN: "6.5", "train/context_length": "128.0"},
    {"step": "9", TRAIN: "5.0", "train/context_length": "128.0"},
    {"step": "9", VAL: "5.5"},
    {"step": "19", TRAIN: "4.0", "train/context_length": "256.0"},
    {"step": "19", VAL: "4.25"},
]


def lines_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The labelled lines of the first panel."""
    return {
        str(line.get_label()): [tuple(point) for point in np.column_stack(line.get_data())]
        for line in figure.axes[0].lines
        if not str(line.get_label()).startswith("_")
    }


def test_it_shows_both_losses_and_the_lengths(figures: list[Figure], tmp_path: Path) -> None:
    draw_losses(ROWS, "mla_tiny", tmp_path / "loss.png", [(0, 128), (15, 256)])
    (figure,) = figures
    assert lines_of(figure) == {
        "training": [(1, 6.5), (10, 5.0), (20, 4.0)],
        "validation": [(10, 5.5), (20, 4.25)],
    }
    axis = figure.axes[0]
    assert axis.get_title(loc="left") == "mla_tiny: loss"
    assert [(text.get_text(), text.xy[0]) for text in axis.texts] == [(" 128", 0), (" 256", 15)]
    assert "dotted: context length" in axis.get_xlabel()


def test_lengths_of_batches_are_no_curriculum(figures: list[Figure], tmp_path: Path) -> None:
    """Unpacked data has another length in each row of the metrics; so have preferences."""
    for lengths in ([], [(0, 256)]):
        draw_losses(ROWS, "sft", tmp_path / "loss.png", lengths)
        axis = figures[-1].axes[0]
        assert len(axis.lines) == 2
        assert not axis.texts
        assert axis.get_xlabel() == "optimizer step"


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    draw_losses([{"step": "3", "lr": "1e-3"}], "x", tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_a_run_and_its_resume_draw_all_of_it(
    ic: Run, figures: list[Figure], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Anew at each validation; a picture that cannot be written is a warning."""
    quick = ("trainer.val_check_interval=2", "callbacks.passkey=null", "callbacks.memory=null")
    run = tmp_path / "runs/debug/default"
    assert ic(*SHORT, *quick, "trainer.max_steps=2") == 0
    assert (run / "loss.png").stat().st_size > 5000
    drawn = len(figures)
    (run / "loss.png").unlink()
    (run / "loss.png").mkdir()  # nothing can take its place
    more = ("trainer.max_steps=4", "ckpt_path=last", "allow_config_change=true")
    with pytest.warns(UserWarning, match="loss.png is not drawn"):
        assert ic(*SHORT, *quick, *more) == 0
    assert len(figures) > drawn
    rows = list(csv.DictReader((run / "csv/metrics.csv").open()))
    for name, metric in (("training", TRAIN), ("validation", VAL)):
        expected = [(int(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
        assert lines_of(figures[-1])[name] == expected
        assert expected[-1][0] == 4
