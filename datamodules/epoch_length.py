"""How long an epoch is, and how often a run reads its examples: one line as training begins.

Few examples and a training time that was chosen for many are read again and again, and neither
loss nor progress tells.
"""

from __future__ import annotations

from dataclasses import dataclass

# More is a warning. Some twenty readings of 1,320 conversations cost a model of this project half
# as much again in perplexity on books as it had before, and nobody had seen that they were twenty.
MOST_READS = 10


@dataclass(frozen=True)
class EpochLength:
    """What training reads in an epoch, and how fast.

    Attributes:
        name: what an example is called, in the singular.
        num_examples, num_tokens: of an epoch.
        num_rows: of an epoch; where rows are packed, those of the first order.
        row_tokens: most tokens of a packed row; None where each example is a row.
        rows_per_step: of all replicas and micro-batches, on average over steps.
        exact: whether every step takes so many.
    """

    name: str
    num_examples: int
    num_tokens: int
    num_rows: int
    row_tokens: int | None
    rows_per_step: float
    exact: bool = True

    @property
    def steps(self) -> float:
        """Optimizer steps; a part of one too, since the next epoch begins within a step."""
        return self.num_rows / self.rows_per_step

    def reads(self, max_steps: int) -> float:
        """How often so many steps read each example; 0 where they have no limit (-1)."""
        return max(max_steps, 0) / self.steps

    def too_often(self, max_steps: int) -> bool:
        """Whether `describe` is a warning."""
        return self.reads(max_steps) > MOST_READS

    def describe(self, setting: str, max_steps: int) -> str:
        """The line, with what to do where the examples are read too often.

        Args:
            setting: that names the files, such as `data.train_files`.
            max_steps: `trainer.max_steps`; -1 for no limit, of which nothing is said.
        """
        about = "" if self.exact else "about "
        line = f"{setting}: {_counted(self.num_examples, self.name)}, "
        line += _counted(self.num_tokens, "token")
        if self.row_tokens is not None:
            line += f" in {_counted(self.num_rows, 'row')} of at most {self.row_tokens:,}"
        steps = _figure(self.steps)
        line += f": an epoch is {about}{steps} {'step' if steps == '1' else 'steps'}"
        if max_steps < 1:
            return line
        line += f"; trainer.max_steps={max_steps} reads "
        reads = self.reads(max_steps)
        if _figure(reads) == "1":
            line += f"them {about}once"
        elif reads < 1:
            line += f"{about}{_figure(100 * reads)} % of them"
        else:
            line += f"them {about}{_figure(reads)} times"
        if self.too_often(max_steps):
            line += f": give more {self.name}s, or a lower trainer.max_steps"
        return line


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _figure(value: float) -> str:
    """Whole from ten on, two figures below."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
