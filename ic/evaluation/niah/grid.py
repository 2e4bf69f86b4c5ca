"""What an evaluation of needles in text measures: cells of task, length and depth.

Without PyTorch and NumPy, so that help and errors come at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ic.datamodules.needle_names import SPLITS
from ic.errors import check_once
from ic.evaluation.options import CONTROL, SuiteOptions

NON_LITERAL = "non_literal"
TASKS = (
    "own_words",
    "other_words",
    "paraphrase",
    "multi_key",
    "multi_attribute",
    "multi_value",
    "records",
    NON_LITERAL,
)


@dataclass(frozen=True)
class Cell:
    """One cell; `depth` is `CONTROL` where no needle is hidden."""

    task: str
    length_tokens: int
    depth: float
    samples: int

    def __str__(self) -> str:
        depth = "no needle" if self.depth == CONTROL else f"depth {self.depth:g}"
        return f"{self.task} {self.length_tokens} tokens, {depth}"


@dataclass
class Config(SuiteOptions):
    """Needles in text: facts between two sentences, asked for at the end.

    Attributes:
        samples: of each task and length, spread evenly over depths and kinds of keys.
        haystack: the text to hide needles in: a file, folder or glob of text, JSON Lines or
            parquet, compressed or not; null for synthetic noise sentences.
        repeat: whether a haystack that is too short for a length may be repeated.
        tasks: what is hidden, and how it is asked for. `own_words`: a fact, asked for in the words
            that state it. `other_words`: in other words. `paraphrase`: and what it is called in
            another word. `multi_key`: one of several facts of the same form. `multi_attribute`:
            one of several facts about one entity. `multi_value`: several values of one fact, all
            asked for. `records`: one of several records (JSON, table rows, log lines). In
            `non_literal` question and needle share no content word.
        forms: the words of statements and questions, the names and the keys are those of this
            split: `test` or `validation`, which training never sees, or `train`.
        kinds: of keys, such as `digits-7`, `hex-8`, `words-3`; empty for those of `forms`.
        records: forms of `records`, such as `json`; empty for all that `forms` has.
        num_needles: other facts beside the one that is asked for; values of `multi_value`.
        depths: places of the needle, 0 the beginning and 1 right before the question.
        control_samples: samples of each task and length without the needle; 0 for none.
    """

    suite: ClassVar[str] = "niah"

    haystack: str | None = None
    repeat: bool = False
    tasks: list[str] = field(
        default_factory=lambda: ["own_words", "other_words", "multi_key", "records", NON_LITERAL]
    )
    forms: str = "test"
    kinds: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    num_needles: int = 4
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    control_samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"{self.key('tasks')}: one or more of {', '.join(TASKS)}")
        if self.forms not in SPLITS:
            raise ValueError(f"{self.key('forms')}: choose one of {', '.join(SPLITS)}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"{self.key('depths')}: at least one, each in [0, 1]")
        for name in ("tasks", "kinds", "records", "depths"):
            check_once(f"suite.niah.{name}", getattr(self, name))
        if not 1 <= self.num_needles <= 64:
            raise ValueError(f"{self.key('num_needles')}: must be between 1 and 64")
        if self.control_samples < 0:
            raise ValueError(f"{self.key('control_samples')}: must be at least 0")

    def cells(self) -> Iterator[Cell]:
        """All cells, short lengths first."""
        for length in sorted(self.lengths):
            samples = self.num_samples(length)
            for task in self.tasks:
                whole, rest = divmod(samples, len(self.depths))
                for place, depth in enumerate(self.depths):
                    if count := whole + (place < rest):
                        yield Cell(task, length, depth, count)
                if control := min(self.control_samples, samples):
                    yield Cell(task, length, CONTROL, control)

    def kind_of(self, kinds: Sequence[str], cell: Cell, index: int) -> str:
        """The kind of key of a cell's sample: in turn, over all depths, so that a few samples show
        all kinds; once every depth would get its first kind again, each gets the next one.
        """
        if cell.task == NON_LITERAL:
            return "first-name"
        place = 0 if cell.depth == CONTROL else self.depths.index(cell.depth)
        number = index * len(self.depths) + place
        again = number // math.lcm(len(self.depths), len(kinds))
        return kinds[(number + again) % len(kinds)]
