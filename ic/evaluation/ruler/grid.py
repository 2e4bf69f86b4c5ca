"""What a RULER evaluation measures: thirteen tasks by length (arXiv 2404.06654)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ic.errors import check_once
from ic.evaluation.options import SuiteOptions

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)


@dataclass
class Config(SuiteOptions):
    """RULER v1 in its published format.

    Attributes:
        tasks: of RULER's thirteen, all by default; RULER's average and effective length are those
            of all.
        haystack: prose in which needles are hidden, in place of the Paul Graham essays: a folder,
            a file or a glob of text, JSON Lines or parquet (a key `text`), compressed or not;
            without it the paragraphs that are shipped, repeated.
        squad: SQuAD v2's `dev-v2.0.json` for `qa_1`; without it the shipped questions.
        hotpotqa: HotpotQA's `hotpot_dev_distractor_v1.json` for `qa_2`; without it the shipped
            questions.
    """

    suite: ClassVar[str] = "ruler"

    lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16384, 32768, 65536, 131072])
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"{self.key('tasks')}: one or more of {', '.join(TASKS)}")
        check_once("suite.ruler.tasks", self.tasks)
