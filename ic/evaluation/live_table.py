"""The table that fills up on a terminal while a suite is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ic.display.numbers import tokens
from ic.evaluation.answered import cell_row
from ic.evaluation.suite import Cell, Row, Suite


@dataclass
class _Place:
    """A task at a length: samples there are, those answered, and those with a score and its sum."""

    samples: int = 0
    answered: int = 0
    scored: int = 0
    correct: float = 0.0

    def __str__(self) -> str:
        if not self.answered:
            return f"0/{self.samples}"
        share = f"{100 * self.correct / self.scored:.0f} % " if self.scored else ""
        return f"{share}{self.answered}/{self.samples}"


class LiveTable:
    """Tasks down, lengths across: the score so far, and how many samples it is of.

    Cells that count for no accuracy, such as controls, are left out once one of their samples
    tells.
    """

    def __init__(self, suite: Suite[Any]) -> None:
        self._suite = suite
        self._places: dict[tuple[str, int], _Place] = {}
        self._counts: dict[Cell, bool] = {}
        for cell in suite.cells():
            self._place(cell).samples += cell.samples

    def add(self, cell: Cell, row: Row) -> None:
        """Take note of a sample."""
        if cell not in self._counts:
            told = row["correct"] is None or self._suite.counted([cell_row([row])])
            self._counts[cell] = bool(told)
            if not self._counts[cell]:
                self._place(cell).samples -= cell.samples
        if self._counts[cell]:
            place = self._place(cell)
            place.answered += 1
            if row["correct"] is not None:
                place.scored += 1
                place.correct += row["correct"]

    def __rich__(self) -> Table:
        lengths = sorted({length for _, length in self._places})
        table = Table(title=self._suite.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("task")
        for length in lengths:
            table.add_column(tokens(length), justify="right")
        for task in dict.fromkeys(task for task, _ in self._places):
            places = (self._places.get((task, length)) for length in lengths)
            table.add_row(task, *("-" if place is None else str(place) for place in places))
        return table

    def _place(self, cell: Cell) -> _Place:
        task = str(getattr(cell, "task", self._suite.name))
        return self._places.setdefault((task, cell.length_tokens), _Place())
