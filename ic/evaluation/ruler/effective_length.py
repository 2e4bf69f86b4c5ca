"""RULER's summary of a model: means by length, effective length and weighted means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ic.display.numbers import tokens
from ic.evaluation.by_length import mean_over_tasks
from ic.evaluation.ruler.grid import TASKS
from ic.evaluation.statistics import pool

# What Llama2-7B (chat) scores at 4k: section 4 of arXiv 2404.06654.
THRESHOLD = 0.856


@dataclass(frozen=True)
class Summary:
    """Of the tasks that were measured.

    Attributes:
        means: mean score from 0 to 1 over the tasks, by length.
        num_tasks: how many were measured; the paper's numbers are of all thirteen.
    """

    means: dict[int, float]
    num_tasks: int

    @property
    def effective_length(self) -> int | None:
        """The longest length whose mean, and that of every shorter one, reaches the threshold."""
        effective = None
        for length, mean in sorted(self.means.items()):
            if mean < THRESHOLD:
                break
            effective = length
        return effective

    @property
    def weighted_inc(self) -> float:
        """Mean over the lengths, with weights 1, 2, 3 ... from the shortest to the longest."""
        return self._weighted(sorted(self.means))

    @property
    def weighted_dec(self) -> float:
        """Mean over the lengths, with weights 1, 2, 3 ... from the longest to the shortest."""
        return self._weighted(sorted(self.means, reverse=True))

    def _weighted(self, lengths: Sequence[int]) -> float:
        total = sum(weight * self.means[at] for weight, at in enumerate(lengths, start=1))
        return total / (len(lengths) * (len(lengths) + 1) / 2)

    @property
    def length_text(self) -> str:
        """`32k`, `at least 128k` for the longest that was measured, `below 4k`."""
        effective = self.effective_length
        if effective is None:
            return f"below {tokens(min(self.means))}"
        at_least = "at least " if effective == max(self.means) else ""
        return f"{at_least}{tokens(effective)}"

    @property
    def row(self) -> dict[str, Any]:
        """Of a results file."""
        return {
            "what": "effective_length",
            "task": f"effective length, {self.num_tasks} of {len(TASKS)} tasks",
            "length_tokens": self.effective_length,
            "num_tasks": self.num_tasks,
            "threshold": THRESHOLD,
            "means": {str(length): mean for length, mean in sorted(self.means.items())},
            "weighted_inc": self.weighted_inc,
            "weighted_dec": self.weighted_dec,
        }

    def __str__(self) -> str:
        of = "" if self.num_tasks == len(TASKS) else f" over {self.num_tasks} of {len(TASKS)} tasks"
        return (
            f"effective length{of}: {self.length_text} (mean of at least {100 * THRESHOLD:.1f}); "
            f"weighted means: {100 * self.weighted_inc:.1f} (long counts more), "
            f"{100 * self.weighted_dec:.1f} (short counts more)"
        )


def summarise(rows: Sequence[dict[str, Any]]) -> Summary:
    """The summary of rows of tasks by length."""
    answers = pool(rows, "task", "length_tokens")
    lengths = sorted({length for _, length in answers})
    means = {length: mean_over_tasks(answers, length) for length in lengths}
    return Summary(means, len({task for task, _ in answers}))
