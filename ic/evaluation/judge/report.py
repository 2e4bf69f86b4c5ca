"""What judgements come to: means with intervals, how many are missing, and their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ic.display.figure import new_figure, save_png
from ic.display.numbers import percent
from ic.evaluation.judge.grid import ABSOLUTE
from ic.evaluation.paired import bootstrap_interval
from ic.evaluation.suite import Row

HEADS = ("grading", "n", "mean", "95 %", "unjudged", "answers")
_SCORES = tuple(f"score_{score}" for score in range(1, 6))
_OUTCOMES = ("lost", "flipped", "won")
COLOR, MISSING_COLOR = "#0072B2", "#BBBBBB"


def graded_rows(cells: Sequence[Row], seed: int) -> list[Row]:
    """One row of a results file for each grading.

    `n`, `correct`, `accuracy` and the interval are of the answers that were judged, as shares
    between 0 and 1; `unjudged` counts the others. An absolute row has the mean score from 1 to 5 as
    well, and how many answers got each; a relative row how many were lost, won, and `flipped`:
    decided by the order in which the two answers were shown. Each has the other's columns empty.
    """
    return [_row(cell, seed) for cell in cells]


def line(row: Row) -> list[str]:
    """A row of a results file as texts under `HEADS`."""
    absolute, judged = row["task"] == ABSOLUTE, row["n"] > 0
    scale = _to_score if absolute else float
    low, high = (f"{scale(row[name]):.2f}" for name in ("low_95", "high_95")) if judged else "--"
    lost, flipped, won = (row[name] for name in _OUTCOMES)
    counts = " ".join(str(row[name]) for name in _SCORES)
    return [
        row["task"],
        str(row["n"]),
        f"{scale(row['accuracy']):.2f}" if judged else "-",
        f"{low} to {high}" if judged else "-",
        str(row["unjudged"]),
        f"1 to 5: {counts}" if absolute else f"lost {lost}, by order {flipped}, won {won}",
    ]


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the PNG file `path`: a histogram for each grading, the unjudged apart."""
    from matplotlib.ticker import MaxNLocator  # late, as all of matplotlib

    figure = new_figure(1.2 + 4.2 * len(rows), 3.6)
    for axis, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        if row["task"] == ABSOLUTE:
            names, columns = list("12345"), _SCORES
        else:
            names, columns = ["lost", "by order", "won"], _OUTCOMES
        places = [*range(len(names)), len(names) + 0.4]
        bars = axis.bar(
            places,
            [*(row[name] for name in columns), row["unjudged"]],
            color=[*[COLOR] * len(names), MISSING_COLOR],
            width=0.8,
        )
        axis.bar_label(bars, fontsize=8)
        axis.set_xticks(places, [*names, "unjudged"], fontsize=8)
        axis.tick_params(length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("answers", fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        _, n, mean, interval, *_ = line(row)
        what = "mean score" if row["task"] == ABSOLUTE else "share won"
        told = f"{what} {mean}, 95 % {interval} (n = {n})" if row["n"] else "nothing judged"
        if row["task"] != ABSOLUTE and row["n"]:
            told += f"\nthe order decides {percent(row['flipped'] / row['n'])}"
        axis.set_title(f"{row['task']}: {told}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_png(figure, path, dpi=150)


def _row(cell: Row, seed: int) -> Row:
    shares = [each["correct"] for each in cell["answers"] if each["correct"] is not None]
    # Without a judgement anything may be true.
    low, high = bootstrap_interval(shares, least=0.0, most=1.0, seed=seed) if shares else (0.0, 1.0)
    row: Row = {
        "what": "judge",
        "task": cell["task"],
        "length_tokens": cell["length_tokens"],
        "n": len(shares),
        "correct": sum(shares),
        "accuracy": sum(shares) / len(shares) if shares else None,
        "low_95": low,
        "high_95": high,
        "unjudged": len(cell["answers"]) - len(shares),
    }
    absolute = cell["task"] == ABSOLUTE
    columns = _SCORES if absolute else _OUTCOMES
    counts = {n: shares.count(i / (len(columns) - 1)) for i, n in enumerate(columns)}
    row["mean_score"] = _to_score(row["accuracy"]) if absolute and shares else None
    row |= {name: counts.get(name) for name in (*_SCORES, *_OUTCOMES)}
    return row


def _to_score(share: float) -> float:
    """0 to 1 -> 1 to 5."""
    return 1 + 4 * share
