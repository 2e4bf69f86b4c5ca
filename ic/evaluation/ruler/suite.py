"""RULER v1 (arXiv 2404.06654): thirteen tasks by length in their published format."""

from __future__ import annotations

import string
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ic.evaluation.by_length import SuiteByLength
from ic.evaluation.characters import check_characters
from ic.evaluation.options import TaskCell
from ic.evaluation.ruler.effective_length import THRESHOLD, summarise
from ic.evaluation.ruler.grid import TASKS, Config
from ic.evaluation.ruler.metrics import METRICS, cleaned
from ic.evaluation.ruler.prompts import PromptMaker, Tokenized
from ic.evaluation.ruler.task import COMMIT
from ic.evaluation.ruler.texts import Texts, name_of
from ic.evaluation.suite import Row, Sample, Score

_CHARACTERS = string.ascii_letters + string.digits + ".,:'()?=-\n"


def build(config: Config) -> RulerSuite:
    return RulerSuite(config)


class RulerSuite(SuiteByLength[Config]):
    """RULER by task and length.

    A sample's `expected` is `{"match": "all" or "part", "outputs": [...]}`.
    """

    name = "ruler"
    title = "RULER v1"
    synthetic = (
        "keys, numbers, words and noise; essays and questions are as suite.ruler.haystack, squad "
        "and hotpotqa say"
    )
    picture = "ruler"
    cached = True
    decides = True

    def __init__(self, options: Config) -> None:
        super().__init__(options)
        self._texts = Texts(options)
        self._maker: PromptMaker | None = None

    def tasks(self) -> Sequence[str]:
        return [task for task in TASKS if task in self.options.tasks]

    def prompt(self, tokenizer: PreTrainedTokenizerBase, cell: TaskCell, index: int) -> Tokenized:
        """Sample `index` of a cell with its text."""
        return self._maker_for(tokenizer).longest(cell, index)

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: TaskCell, index: int) -> Sample:
        made = self.prompt(tokenizer, cell, index)
        metric = self._maker_for(tokenizer).task(cell.task).metric
        expected = {"match": metric, "outputs": made.prompt.outputs}
        return Sample(made.ids, expected, made.new_tokens)

    def score(self, sample: Sample, text: str) -> Score:
        metric = METRICS[sample.expected["match"]]
        return Score(sample.expected, text, metric(cleaned(text), sample.expected["outputs"]))

    def decided(self, sample: Sample, text: str) -> bool:
        """All that is looked for stands there, and RULER takes nothing off for what follows."""
        return self.score(sample, text).correct == 1

    def settings(self) -> dict[str, Any]:
        return {
            "seed": self.options.seed,
            "prompt": self.options.prompt,
            "format": COMMIT,
            "wonderwords": version("wonderwords"),
            **self._texts.digests,
        }

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        longest = max(self.options.lengths)
        if longest > positions:
            raise ValueError(
                f"suite.ruler.lengths: {longest:,} tokens, but the model has {positions:,} "
                "positions (max_position_embeddings); leave the longer lengths out"
            )
        check_characters(tokenizer, _CHARACTERS, self.name)
        maker = self._maker_for(tokenizer)
        for length in sorted(self.options.lengths):
            cells = [cell for cell in self.cells() if cell.length_tokens == length]
            least = {cell.task: _least_tokens(maker, cell) for cell in cells}
            needed = [f"{task} {least[task]:,}" for task in least if least[task] > length]
            if needed:
                raise ValueError(
                    f"suite.ruler.lengths: {length:,} tokens are too few, with those to generate, "
                    f"for {', '.join(needed)}; give longer lengths or leave tasks out of "
                    "suite.ruler.tasks"
                )

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        """Rows of tasks with where their `text` comes from, then the summary."""
        rows = [{**row, "text": name_of(self.options, row["task"])} for row in super().rows(cells)]
        return [*rows, summarise(rows).row] if rows else []

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row["task"] in TASKS]

    def table(self, rows: Sequence[Row]) -> Table:
        rows = self.counted(rows)
        table = super().table(rows)
        table.min_width = 72  # for the caption
        table.caption = f"per cent; {summarise(rows)}{_origins(rows, self.options)}"
        return table

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        """A line for each task and length, where its text comes from, and RULER's own summary."""
        rows = self.counted(rows)
        heads, lines = super().published(rows)
        origins = {row["task"]: row.get("text", name_of(self.options, row["task"])) for row in rows}
        summary = summarise(rows)
        of_tasks = f"of {summary.num_tasks} of {len(TASKS)} tasks"
        least = f"mean of at least {100 * THRESHOLD:.1f} %"
        inc, dec = (f"{100 * mean:.1f}" for mean in (summary.weighted_inc, summary.weighted_dec))
        summed = [
            *(
                [f"mean {of_tasks}", f"{length:,}", f"{100 * mean:.1f} %"]
                for length, mean in sorted(summary.means.items())
            ),
            [f"effective length {of_tasks}", summary.length_text, least],
            ["weighted mean, inc / dec", "", f"{inc} / {dec} %"],
        ]
        return (
            [*heads, "text"],
            [
                *([*line, origins[line[0]] or "-"] for line in lines),
                *([*line, "", "", ""] for line in summed),
            ],
        )

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        rows = self.counted(rows)
        summary = summarise(rows)
        some = "" if summary.num_tasks == len(TASKS) else f", {summary.num_tasks} of 13 tasks"
        title = f"{title}\neffective length {summary.length_text}{some}"
        super().draw(rows, path, title=title, trained_length=trained_length)

    def _maker_for(self, tokenizer: PreTrainedTokenizerBase) -> PromptMaker:
        if self._maker is None or self._maker.tokenizer is not tokenizer:
            self._maker = PromptMaker(self.options, self._texts, tokenizer)
        return self._maker


def _least_tokens(maker: PromptMaker, cell: TaskCell) -> int:
    """That the longest of a cell's samples takes without more haystack than it needs.

    Samples of a task differ by a few tokens, but questions come with documents of any length.
    """
    first = maker.shortest(cell, 0).tokens
    if not cell.task.startswith("qa_") and first < 0.8 * cell.length_tokens:
        return first
    return max(maker.shortest(cell, index).tokens for index in range(cell.samples))


def _origins(rows: Sequence[Row], options: Config) -> str:
    """Where texts come from that RULER takes from elsewhere."""
    found = {row["task"]: row.get("text", name_of(options, row["task"])) for row in rows}
    by_name: dict[str, list[str]] = {}
    for task, name in found.items():
        if name is not None:
            by_name.setdefault(name, []).append(task)
    texts = [f"{name} for {', '.join(tasks)}" for name, tasks in by_name.items()]
    return f"; text: {'; '.join(texts)}" if texts else ""
