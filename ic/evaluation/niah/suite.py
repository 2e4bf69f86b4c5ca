"""Needles in real text: facts of held-out forms between two sentences of the user's documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ic.evaluation.by_depth import depth_rows, is_control
from ic.evaluation.by_depth_figure import draw_by_depth
from ic.evaluation.by_depth_tables import document_table, terminal_table
from ic.evaluation.niah.grid import Cell, Config
from ic.evaluation.niah.haystack import Haystack, noise_haystack, read_haystack
from ic.evaluation.niah.needles import check_kinds, kinds_of_keys
from ic.evaluation.niah.prompts import SPARE_TOKENS, build_prompt, parts_of
from ic.evaluation.niah.scoring import begins_with, holds, normalise, share_of_values
from ic.evaluation.options import CONTROL
from ic.evaluation.suite import Row, Sample, Score, Suite

_COUNTED = "right answers"


def build(config: Config) -> NiahSuite:
    """Reads the haystack, so that a wrong one is refused before a model is loaded."""
    if config.haystack is None:
        return NiahSuite(config, noise_haystack())
    return NiahSuite(config, read_haystack(config.haystack, repeat=config.repeat))


class NiahSuite(Suite[Cell]):
    """Facts hidden in text.

    Raises:
        ValueError: kinds of keys or records that the forms do not have.
    """

    name = "niah"
    picture = "heatmap"
    answering = "Answers are greedy and right if they hold the value as a whole"
    cached = True

    def __init__(self, options: Config, haystack: Haystack) -> None:
        self.options = options
        self.haystack = haystack
        check_kinds(options)
        where = "synthetic noise" if options.haystack is None else "real text"
        self.title = f"needles in {where}, {options.forms} forms"
        self.synthetic = (
            "every text and every question"
            if options.haystack is None
            else "needles, keys and questions; the prose around them is the given haystack"
        )
        self.tokens_per_batch = options.tokens_per_batch
        self.prefill_chunk_tokens = options.prefill_chunk_tokens

    def cells(self) -> Iterator[Cell]:
        return self.options.cells()

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: Cell, index: int) -> Sample:
        return build_prompt(tokenizer, self.options, self.haystack, cell, index)

    def score(self, sample: Sample, text: str) -> Score:
        """The answer has to hold the value as a whole, and no distractor's before it: a list of all
        is not right. Of several values the share that it holds counts.

        `scoring.normalise` says what makes no difference. `measured` also holds `at_once`: whether
        the answer begins with the value, which an earlier version wanted of plain prompts.
        """
        measured = dict(sample.expected)
        values, others = measured.pop("values"), measured.pop("other_values")
        measured["at_once"] = any(begins_with(text, value) for value in values)
        if len(values) == 1:
            return Score(values, text, holds(text, values[0], others), measured)
        return Score(values, text, share_of_values(text, values), measured)

    def settings(self) -> dict[str, Any]:
        """Also by what rule answers count and after how many tokens they are cut, so that those of
        earlier versions are not taken for today's.
        """
        options = self.options
        names = ("forms", "records", "num_needles", "depths", "prompt", "seed", "repeat")
        shaping = {name: getattr(options, name) for name in names}
        return {
            **shaping,
            "kinds": kinds_of_keys(options),
            "haystack": self.haystack.digest,
            "right": "holds the value, none of a distractor before it",
            "spare_tokens": SPARE_TOKENS,
        }

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        """Also reads back what the tokenizer makes of the needles, and counts the text's tokens."""
        shortest, longest = min(self.options.lengths), max(self.options.lengths)
        self.options.check_positions(positions)
        for cell in self.cells():
            if cell.length_tokens == shortest and cell.depth != CONTROL:
                for index in range(cell.samples):
                    self._check_round_trip(tokenizer, cell, index)
        self.haystack.check(tokenizer, longest)

    def _check_round_trip(self, tokenizer: PreTrainedTokenizerBase, cell: Cell, index: int) -> None:
        parts = parts_of(tokenizer, self.options, cell, index)
        needles = parts.needles
        stated = [needle.text for needle in (needles.needle, *needles.others)]
        for text in (*stated, needles.question, *needles.values):
            read = str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))
            if _bare(read) != _bare(text):
                raise ValueError(
                    f"suite.niah: the tokenizer reads {text!r} back as {read!r}, so a model "
                    f"cannot give it; choose other kinds of keys than {parts.kind} "
                    "(suite.niah.kinds), other tasks, or a tokenizer with all characters"
                )

    def cheap(self, lengths: Sequence[int], samples: int) -> NiahSuite:
        """On the forms and keys for validation, with no control."""
        options = replace(
            self.options,
            lengths=list(lengths),
            samples=samples,
            samples_by_length={},
            control_samples=0,
            forms="validation",
            kinds=[] if self.options.forms != "validation" else self.options.kinds,
            records=[] if self.options.forms != "validation" else self.options.records,
        )
        return NiahSuite(options, self.haystack)

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        """One row per task, length and depth (`control` has no needle), kinds of keys pooled; then
        one per kind of key, length and depth, tasks pooled, as the task `with <kind>`.
        """
        return depth_rows(_with_kinds(cells), self.name)

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if not is_control(row) and not _is_kind(row)]

    def table(self, rows: Sequence[Row]) -> Table:
        title = f"{self.title}, greedy decoding"
        return terminal_table(_with_kinds(rows), title=title, counted=_COUNTED)

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        return document_table(_with_kinds(rows), counted=_COUNTED)

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        tasks = [row for row in rows if not _is_kind(row)]
        draw_by_depth(tasks, path, title=title, trained_length=trained_length, counted=_COUNTED)


_KIND = "with "  # behind all tasks in the order of the alphabet


def _is_kind(row: Row) -> bool:
    return bool(row["task"].startswith(_KIND))


def _with_kinds(rows: Sequence[Row]) -> list[Row]:
    """The rows, and behind those of cells the same answers by kind of key."""
    by_kind = [
        {
            "task": f"{_KIND}{answer['measured']['kind']}",
            "length_tokens": row["length_tokens"],
            "depth": row["depth"],
            "n": 1,
            "correct": answer["correct"],
        }
        for row in rows
        for answer in row.get("answers", ())
    ]
    return [*rows, *by_kind]


def _bare(text: str) -> str:
    return normalise(text).replace(" ", "")
