"""Answers to instructions, graded by another model behind an OpenAI-compatible server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ic.evaluation.framing import encode, frame_prompt
from ic.evaluation.judge.client import JudgeClient
from ic.evaluation.judge.grading import Judge, Judgement, Question
from ic.evaluation.judge.grid import ABSOLUTE, Config, GradedCell
from ic.evaluation.judge.instructions import Instruction, read_instructions
from ic.evaluation.judge.prometheus import (
    absolute_messages,
    parse_score,
    parse_verdict,
    relative_messages,
    rubric_text,
)
from ic.evaluation.judge.report import HEADS, draw, graded_rows, line
from ic.evaluation.suite import Decoder, Row, Sample, Score, Suite
from ic.files.run_folder import SuiteFolder


def build(config: Config) -> JudgeSuite:
    return JudgeSuite(config)


class JudgeSuite(Suite[GradedCell]):
    """Instructions from a file; `correct` of an absolute score is 0 for a 1 and 1 for a 5, of a
    comparison 1 where the answer wins in both orders, 0 where its rival does, 0.5 where the verdict
    depends on the order.
    """

    name = "judge"
    title = "answers graded by a judge"
    picture = "grades"
    synthetic = "nothing, if the instructions of suite.judge.instructions are not"
    texts_by_tokens = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokens_per_batch = config.tokens_per_batch
        self.prefill_chunk_tokens = config.prefill_chunk_tokens
        self._judge: Judge | None = None
        # Both gradings are about the same answers.
        self._texts: dict[bytes, str] = {}

    @cached_property
    def instructions(self) -> list[Instruction]:
        return read_instructions(self.config)

    def connect(self) -> None:
        """Read the instructions and find the judge."""
        assert self.instructions
        with JudgeClient(self.config) as client:
            client.check()

    def begin(self, file: Path | None) -> None:
        """Judgements lie beside the answers; a process that writes no answers asks no judge."""
        if file is None:
            self._judge = None
            return
        (judgements,) = self.keyed_files(file)
        own = "".join(Path(file.name).suffixes[:-1])  # `.rank1`, or nothing
        self._judge = Judge(
            JudgeClient(self.config), judgements.with_name(f"{judgements.stem}{own}.jsonl")
        )

    def keyed_files(self, file: Path) -> Sequence[Path]:
        return (SuiteFolder(file.parent).judgements,)

    def cells(self) -> Iterator[GradedCell]:
        for grading in self.config.gradings:
            yield GradedCell(grading, self.config.length, len(self.instructions))

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: GradedCell, index: int) -> Sample:
        given = self.instructions[index]
        question = given.instruction + ("" if self.config.prompt == "chat" else "\n\n")
        frame = frame_prompt(tokenizer, self.config.prompt)
        ids = np.concatenate([frame.before, encode(tokenizer, question), frame.after])
        expected = {"grading": cell.task, **asdict(given)}
        return Sample(ids, expected, self.config.max_new_tokens)

    def answer(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
    ) -> list[Score]:
        new = [sample for sample in samples if sample.ids.tobytes() not in self._texts]
        for sample, score in zip(new, super().answer(decoder, tokenizer, new), strict=True):
            self._texts[sample.ids.tobytes()] = score.text
        texts = [self._texts[sample.ids.tobytes()] for sample in samples]
        if self._judge is None:
            return [self.score(sample, text) for sample, text in zip(samples, texts, strict=True)]
        asked = [
            _questions(sample.expected, text) for sample, text in zip(samples, texts, strict=True)
        ]
        judged = iter(self._judge.ask([question for each in asked for question in each]))
        return [
            _score(sample, text, [next(judged) for _ in questions])
            for sample, text, questions in zip(samples, texts, asked, strict=True)
        ]

    def score(self, sample: Sample, text: str) -> Score:
        """An answer that no judge has seen."""
        return Score(sample.expected, text, None)

    def settings(self) -> dict[str, Any]:
        asked = json.dumps([asdict(each) for each in self.instructions], sort_keys=True)
        shaping = ("model", "temperature", "retry_temperature", "max_tokens", "request")
        names = (*shaping, "times_asked", "prompt", "max_new_tokens")
        return {
            "instructions": hashlib.sha256(asked.encode()).hexdigest()[:16],
            **{name: asdict(self.config)[name] for name in names},
        }

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        (cell, *_) = self.cells()
        for index in range(cell.samples):
            sample = self.sample(tokenizer, cell, index)
            total = len(sample.ids) + sample.new_tokens
            for most, what in (
                (self.config.length, f"suite.judge.length is {self.config.length}"),
                (positions, f"the model has {positions} positions (max_position_embeddings)"),
            ):
                if total > most:
                    raise ValueError(
                        f"suite.judge.instructions: instruction {index + 1} and its answer come to "
                        f"{total} tokens, but {what}; shorten it, or lower "
                        "suite.judge.max_new_tokens"
                    )

    def cheap(self, lengths: Sequence[int], samples: int) -> JudgeSuite:
        return JudgeSuite(replace(self.config, samples=samples))

    def progress_text(self, row: Row) -> str:
        (graded,) = graded_rows([row], self.config.seed)
        return f"{graded['n']} judged, {graded['unjudged']} unjudged"

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        return graded_rows(cells, self.config.seed)

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def table(self, rows: Sequence[Row]) -> Table:
        table = Table(
            title=f"graded by {self.config.model}, rubric: {self._rubric()}",
            caption="absolute: mean of 1 to 5; relative: share won, a half where the order decides",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index, head in enumerate(HEADS):
            table.add_column(head, justify="right" if index else "left")
        for row in self._graded(rows):
            table.add_row(*line(row))
        return table

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        return list(HEADS), [line(row) for row in self._graded(rows)]

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        """A histogram for each grading; how long a context was trained does not matter here."""
        draw(self._graded(rows), path, title=f"{title}: {self.config.model}, {self._rubric()}")

    def _graded(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of a results file, whichever rows are at hand."""
        return self.rows(rows) if any("answers" in row for row in rows) else list(rows)

    def _rubric(self) -> str:
        return self.config.rubric.partition("\n")[0]


def _questions(expected: Row, text: str) -> list[Question]:
    """What a judge is asked of an answer: once for a score, in both orders for a comparison."""
    instruction, reference = expected["instruction"], expected["reference"]
    rubric = rubric_text(expected["rubric"])
    if expected["grading"] == ABSOLUTE:
        return [Question(absolute_messages(instruction, text, rubric, reference), parse_score)]
    rival = expected["rival"]
    return [
        Question(relative_messages(instruction, a, b, rubric, reference), parse_verdict)
        for a, b in ((text, rival), (rival, text))
    ]


def _score(sample: Sample, text: str, judgements: list[Judgement]) -> Score:
    results = [judgement.result for judgement in judgements]
    measured: dict[str, Any] = {"times_asked": sum(each.times_asked for each in judgements)}
    if sample.expected["grading"] == ABSOLUTE:
        (result,) = results
        measured |= {"score": result, "feedback": judgements[0].text}
        correct = None if result is None else (int(result) - 1) / 4
    else:
        # The answer is A when it comes first, and B when it comes second.
        won = [None if r is None else r == own for r, own in zip(results, "AB", strict=True)]
        measured |= {"first": results[0], "second": results[1]}
        measured |= {"feedback": "\n\n".join(each.text for each in judgements)}
        correct = None if None in won else sum(map(bool, won)) / 2
    return Score(sample.expected, text, correct, measured)
