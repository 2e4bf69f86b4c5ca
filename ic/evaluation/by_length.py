"""What is shown of a suite whose cells are tasks at lengths: rows, tables and a picture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ic.display.numbers import tokens
from ic.evaluation.by_length_figure import draw_by_length
from ic.evaluation.options import SuiteOptions, TaskCell
from ic.evaluation.statistics import Accuracy, pool
from ic.evaluation.suite import Row, Suite

O = TypeVar("O", bound=SuiteOptions)  # noqa: E741


class SuiteByLength(Suite[TaskCell], Generic[O]):
    """A suite of tasks at lengths whose scores are right or wrong, or shares between 0 and 1.

    Wilson's interval is exact for right or wrong; for the mean of shares it is too wide rather than
    too narrow, because a share varies less than a coin of the same mean.
    """

    def __init__(self, options: O) -> None:
        self.options = options
        self.tokens_per_batch = options.tokens_per_batch
        self.prefill_chunk_tokens = options.prefill_chunk_tokens

    @abstractmethod
    def tasks(self) -> Sequence[str]:
        """The tasks that were chosen, in the order in which to show them."""

    def cells(self) -> Iterator[TaskCell]:
        return self.options.task_cells(self.tasks())

    def cheap(self, lengths: Sequence[int], samples: int) -> Self:
        options = replace(
            self.options,
            lengths=list(lengths),
            samples=samples,
            samples_by_length={},
            seed=self.options.seed + 1,
        )
        return type(self)(options)

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        return [
            {"what": self.name, "task": task, "length_tokens": length, **answers.columns}
            for (task, length), answers in pool(cells, "task", "length_tokens").items()
        ]

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def table(self, rows: Sequence[Row]) -> Table:
        heads, lines = self._percentages(rows)
        table = Table(
            title=self.title,
            caption="per cent; the last line is the mean over the tasks",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index, head in enumerate(heads):
            table.add_column(head, justify="right" if index else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        heads = ["task", "tokens", "score", "95 % interval", "n"]
        lines = []
        for (task, length), answers in pool(rows, "task", "length_tokens").items():
            low, high = answers.interval
            lines.append(
                [
                    task,
                    f"{length:,}",
                    f"{100 * answers.share:.1f} %",
                    f"{100 * low:.1f}-{100 * high:.1f} %",
                    str(answers.n),
                ]
            )
        return heads, lines

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        answers = pool(rows, "task", "length_tokens")
        draw_by_length(answers, path, title=title, trained_length=trained_length)

    @staticmethod
    def _percentages(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        answers: dict[Any, Accuracy] = pool(rows, "task", "length_tokens")
        lengths = sorted({length for _, length in answers})
        tasks = list(dict.fromkeys(task for task, _ in answers))
        lines = []
        for task in tasks:
            shares = [answers.get((task, length)) for length in lengths]
            lines.append([task, *("-" if a is None else f"{100 * a.share:.1f}" for a in shares)])
        if len(tasks) > 1:
            means = [mean_over_tasks(answers, length) for length in lengths]
            lines.append(["mean", *(f"{100 * mean:.1f}" for mean in means)])
        return ["task", *map(tokens, lengths)], lines


def mean_over_tasks(answers: dict[Any, Accuracy], length: int) -> float:
    """Mean share of the tasks that were measured at a length, each counted once."""
    shares = [a.share for (_, at), a in answers.items() if at == length]
    return sum(shares) / len(shares)
