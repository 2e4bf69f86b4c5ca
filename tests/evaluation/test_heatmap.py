"""What the heatmap of several tasks shows, panel by panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ic.evaluation.by_depth_figure import draw_by_depth
from ic.evaluation.by_depth_tables import document_table, terminal_table
from ic.evaluation.by_length_figure import draw_by_length
from ic.evaluation.options import CONTROL
from ic.evaluation.statistics import Accuracy


def row(task: str, length: int, depth: float, correct: int) -> dict[str, Any]:
    return {
        "task": task,
        "length_tokens": length,
        "depth": depth,
        "filler": "noise",
        "n": 10,
        "correct": correct,
    }


# Every cell has its own number of right answers, so that none can stand for another.
HIDDEN = [
    row("single", 512, 0.0, 10),
    row("single", 512, 1.0, 9),
    row("single", 2048, 0.0, 8),
    row("single", 2048, 1.0, 7),
    row("multi_key", 512, 0.0, 6),
    row("multi_key", 512, 1.0, 5),
    row("multi_key", 2048, 0.0, 4),
    row("multi_key", 2048, 1.0, 3),
]
CONTROLS = [
    row("single", 512, CONTROL, 0),
    row("single", 2048, CONTROL, 1),
    row("multi_key", 512, CONTROL, 2),
    row("multi_key", 2048, CONTROL, 0),
]


def cells(axis: Any) -> dict[tuple[int, float], str]:
    """What is written in a panel, by the nearest length on its axis and its line."""
    found = {}
    for text in axis.texts:
        x, y = text.get_position()
        found[512 if x < 1024 else 2048, y] = text.get_text().split("\n")[0]
    return found


@pytest.mark.parametrize("control", [True, False])
def test_each_task_has_its_panel_and_its_control(
    control: bool, figures: list[Figure], tmp_path: Path
) -> None:
    rows = [*HIDDEN, *(CONTROLS if control else [])]
    draw_by_depth(rows, tmp_path / "heatmap.png", title="t", trained_length=512)
    (figure,) = figures
    *panels, bar = figure.axes
    assert bar.get_ylabel() == "exact answers in per cent"
    assert [label.get_text() for label in bar.get_yticklabels()][::5] == ["0", "100"]
    hidden = panels[::2] if control else panels
    expected = {
        "single": ("10/10", "9/10", "8/10", "7/10"),
        "multi_key": ("6/10", "5/10", "4/10", "3/10"),
    }
    for axis, (task, answers) in zip(hidden, expected.items(), strict=True):
        assert axis.get_title(loc="left") == task
        assert axis.get_ylabel() == "depth of the needle"
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0 %", "100 %"]
        assert cells(axis) == dict(
            zip([(512, 0), (512, 1), (2048, 0), (2048, 1)], answers, strict=True)
        )
    if control:
        for axis, answers in zip(panels[1::2], (("0/10", "1/10"), ("2/10", "0/10")), strict=True):
            assert axis.get_ylabel() == ""
            assert [label.get_text() for label in axis.get_yticklabels()] == ["no needle"]
            assert cells(axis) == {(512, 0): answers[0], (2048, 0): answers[1]}
            assert len({text.get_color() for text in axis.texts}) == 1  # dark on its one grey
    # Said once; drawn through all.
    assert figure.get_supxlabel().endswith("\ndashed: trained to 512 tokens")
    (marks,) = {tuple(axis.lines[0].get_xdata()) for axis in panels}
    assert marks == (1024.0, 1024.0)  # behind the trained column
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == ["512", "2k"]
    assert ("no needle in the text" in figure.get_supxlabel()) is control


def test_many_tasks_stand_in_columns(figures: list[Figure], tmp_path: Path) -> None:
    """Eight tasks were a picture five times as tall as wide, with a legend in its middle."""
    tasks = [f"task_{number}" for number in range(8)]
    depths = [0.0, 0.25, 0.5, 0.75, 1.0, CONTROL]
    rows = [row(t, n, d, i % 10) for i, t in enumerate(tasks) for n in (512, 2048) for d in depths]
    draw_by_depth(rows, tmp_path / "heatmap.png", title="t")
    (figure,) = figures
    width, height = figure.get_size_inches()
    assert 0.8 < height / width < 1.25
    *panels, bar = figure.axes
    hidden = [axis for axis in panels if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in hidden] == tasks
    # In its own panel each task's own number of right answers.
    for number, axis in enumerate(hidden):
        assert {text.get_text().partition("/")[0] for text in axis.texts} == {str(number)}
    assert len(panels) == 16  # an empty place of the grid is no panel
    depth_labels = [axis for axis in panels if axis.get_ylabel()]
    assert len({round(axis.get_position().x0, 3) for axis in depth_labels}) == 1
    assert len([axis for axis in panels if axis.get_xlabel()]) == 3  # below each column
    # At the top, and no longer than three inches or so.
    place = bar.get_position()
    assert place.y1 > 0.9
    assert (place.y1 - place.y0) * height < 3.6


def test_a_length_between_two_columns_is_marked_where_it_is(
    figures: list[Figure], tmp_path: Path
) -> None:
    draw_by_depth(HIDDEN, tmp_path / "heatmap.png", title="t", trained_length=1500)
    assert figures[0].axes[0].lines[0].get_xdata()[0] == 1500.0


def test_text_is_light_on_dark_cells_alone(figures: list[Figure], tmp_path: Path) -> None:
    draw_by_depth(HIDDEN, tmp_path / "heatmap.png", title="t")
    texts = [text for axis in figures[0].axes for text in axis.texts]
    colors = {int(text.get_text().partition("/")[0]): text.get_color() for text in texts}
    assert {n for n, color in colors.items() if color == colors[3]} == {3, 4, 5}
    assert {n for n, color in colors.items() if color == colors[10]} == {6, 7, 8, 9, 10}


@pytest.mark.parametrize(("control", "shown"), [(True, ["2/10", "0/10"]), (False, ["-", "-"])])
def test_tables_show_the_worst_depth_and_the_control(control: bool, shown: list[str]) -> None:
    rows = [row for row in [*HIDDEN, *(CONTROLS if control else [])] if row["task"] == "multi_key"]
    heads, lines = document_table(rows)
    assert heads[1:3] == ["tokens", "exact answers"]
    assert document_table(rows, counted="right answers")[0][2] == "right answers"
    assert [line[:3] + line[4:5] for line in lines] == [
        ["multi_key", "512", "11/20", "5/10"],
        ["multi_key", "2,048", "7/20", "3/10"],
    ]
    assert [line[-1] for line in lines] == shown
    table = terminal_table(rows, title="passkeys")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["acc. %"] == ["55.0", "35.0"]
    assert columns["95 %"] == ["34-74", "18-57"]
    assert columns["worst cell"] == ["5/10, depth 100 %", "3/10, depth 100 %"]
    assert columns["no needle"] == shown


def test_scores_by_length_have_a_bar_in_per_cent(figures: list[Figure], tmp_path: Path) -> None:
    draw_by_length({("vt", 512): Accuracy(3, 4)}, tmp_path / "scores.png", title="t")
    axis, bar = figures[0].axes
    assert axis.texts[0].get_text().startswith("75\n")
    assert bar.get_ylabel() == "score in per cent"
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert (labels[0], labels[-1]) == ("0", "100")
