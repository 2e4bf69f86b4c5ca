"""From losses of documents to perplexity by position: rows, and the tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ic.display.numbers import tokens
from ic.evaluation.statistics import mean_columns
from ic.evaluation.suite import Row

# What `position` says: one bucket of positions, or all of a length together.
BUCKET, WHOLE = "bucket", "all"


def as_rows(rows: Sequence[Row]) -> list[Row]:
    """Results rows, whether given as such or as rows of a cells file."""
    return curve_rows(rows) if rows and "answers" in rows[0] else list(rows)


def curve_rows(cells: Sequence[Row]) -> list[Row]:
    """A row for each task, length and bucket of positions, and one for all positions.

    Documents are the unit: `nll` is the mean over them of each one's mean loss in nats per token,
    `nll_low_95` and `nll_high_95` Student's interval of that mean (null for one document), and
    `bits_per_byte` the mean of each one's.
    """
    return [row for cell in cells for row in _rows_of(cell)]


def _rows_of(cell: Row) -> Iterator[Row]:
    measured = [answer["measured"] for answer in cell["answers"]]
    edges = measured[0]["edges"]
    spans = [(BUCKET, i, i + 1) for i in range(len(edges) - 1)]
    for position, first, end in [*spans, (WHOLE, 0, len(edges) - 1)]:
        count = edges[end] - edges[first]
        nats = [sum(each["nats"][first:end]) for each in measured]
        sizes = [sum(each["bytes"][first:end]) for each in measured]
        nll = mean_columns("nll", [each / count for each in nats])
        bits = [each / math.log(2) / size for each, size in zip(nats, sizes, strict=True) if size]
        yield {
            "what": "perplexity",
            "task": cell["task"],
            "length_tokens": cell["length_tokens"],
            "window_tokens": measured[0]["window_tokens"],
            "position": position,
            "from_token": edges[first],
            "to_token": edges[end],
            "n": len(nats),
            "n_tokens": count * len(nats),
            **nll,
            "perplexity": math.exp(nll["nll"]),
            "bits_per_byte": math.fsum(bits) / len(bits) if bits else None,
        }


def terminal_table(rows: Sequence[Row], title: str) -> Table:
    """Lengths and positions down, tasks across."""
    rows = as_rows(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    documents = sorted({row["n"] for row in rows})
    table = Table(
        title=title,
        caption="perplexity [95 % interval over documents] and bits per byte of "
        f"{' to '.join(map(str, documents[:: max(1, len(documents) - 1)]))} documents per length, "
        "each read from its beginning and as long as the length",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("length", justify="right")
    table.add_column("position")
    for task in tasks:
        named = next(row for row in rows if row["task"] == task)
        table.add_column(task_name(named), justify="right")
        table.add_column("bits", justify="right")
    lines: dict[tuple[int, str, int, int], dict[str, Row]] = {}
    for row in rows:
        place = (row["length_tokens"], row["position"], row["from_token"], row["to_token"])
        lines.setdefault(place, {})[row["task"]] = row
    for (length, *_), by_task in lines.items():
        found = [by_task.get(task) for task in tasks]
        line = [text for row in found for text in (("-", "-") if row is None else _numbers(row))]
        table.add_row(tokens(length), _position(next(iter(by_task.values()))), *line)
    return table


def document_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines for documents."""
    heads = ["task", "tokens", "position", "perplexity [95 %]", "bits per byte", "documents"]
    return heads, [
        [task_name(row), f"{row['length_tokens']:,}", _position(row), *_numbers(row), str(row["n"])]
        for row in as_rows(rows)
    ]


def task_name(row: Row) -> str:
    """`full`, or `sliding 4k` with the length of the window."""
    window = row["window_tokens"]
    return str(row["task"]) if window is None else f"{row['task']} {tokens(window)}"


def _position(row: Row) -> str:
    span = f"{row['from_token']:,}-{row['to_token'] - 1:,}"
    return "all" if row["position"] == WHOLE else span


def _numbers(row: Row) -> tuple[str, str]:
    bits = row["bits_per_byte"]
    text = perplexity_text(row["perplexity"])
    if row["nll_low_95"] is not None:
        low, high = math.exp(row["nll_low_95"]), math.exp(row["nll_high_95"])
        text += f" [{perplexity_text(low)}-{perplexity_text(high)}]"
    return text, "-" if bits is None else f"{bits:.3f}"


def perplexity_text(perplexity: float) -> str:
    """Four figures: 12.35; whole from 1,000 on."""
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.4g}"
