"""Tasks of lm-evaluation-harness on our models.

A cell is a task, a sample one of its documents with every request about it. The harness writes the
prompts and scores the answers; our decoder reads the prompts and our runner keeps the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ic.display.figure import new_figure, save_png
from ic.errors import UsageError
from ic.evaluation.harness.grid import Config, HarnessCell
from ic.evaluation.suite import Decoder, Row, Sample, Score, Suite

if TYPE_CHECKING:
    from ic.evaluation.harness.language_model import DecoderLM
    from ic.evaluation.harness.tasks import Answered, LoadedTasks


class HarnessSuite(Suite[HarnessCell]):
    """Tasks of lm-evaluation-harness.

    `check` loads them, because some measure their documents with the model's tokenizer; whatever
    asks for cells or samples calls it first.
    """

    name = "harness"
    title = "tasks of lm-evaluation-harness"
    picture = "tasks"
    synthetic = "what the tasks of lm-evaluation-harness say of themselves"

    def __init__(self, options: Config) -> None:
        self.options = options
        self.tokens_per_batch = options.tokens_per_batch
        self.prefill_chunk_tokens = options.prefill_chunk_tokens
        self._tasks: LoadedTasks | None = None
        self._model: DecoderLM | None = None
        self._version = ""
        self._cells: list[HarnessCell] = []
        self._truncated: dict[str, int] = {}
        self._rows: tuple[list[Row], list[Row]] = ([], [])  # the last cells, and their results

    @property
    def tasks(self) -> LoadedTasks:
        """What `check` loaded."""
        assert self._tasks is not None, "check comes first"
        return self._tasks

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        """Load the tasks and write their prompts.

        Raises:
            UsageError: the harness is missing, a task cannot be run, or prompts do not fit.
        """
        from ic.evaluation.harness.tasks import LoadedTasks, check_installed

        if self._model is not None and self._model.tokenizer is tokenizer:
            return
        self._version = check_installed()
        from ic.evaluation.harness.language_model import DecoderLM

        longest = self.options.max_length or positions
        if longest > positions:
            raise UsageError(
                f"suite.harness.max_length={longest}: the model has {positions} positions"
            )
        model = DecoderLM(
            None,
            tokenizer,
            longest,
            tokens_per_batch=self.options.tokens_per_batch,
            too_long=self.options.too_long,
            quiet=True,
        )
        tasks = LoadedTasks(self.options, tokenizer)
        tasks.build_requests(model)
        self._cells = []
        for name in tasks.tasks:
            before = model.truncated
            tokens = min(longest, max(model.sizes(tasks.requests(name))))
            self._truncated[name] = model.truncated - before
            shots, documents = tasks.num_fewshot(name), tasks.documents(name)
            cell = HarnessCell(name, shots, tasks.identity(name), documents, tokens)
            self._cells.append(cell)
        self._tasks, self._model = tasks, model

    def cells(self) -> Iterator[HarnessCell]:
        assert self._tasks is not None, "check comes first"
        yield from self._cells

    def settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "lm_eval": self._version,
            "apply_chat_template": options.apply_chat_template,
            "system_instruction": options.system_instruction,
            "fewshot_as_multiturn": options.fewshot_as_multiturn,
            "max_length": options.max_length,
            "too_long": options.too_long,
            "seed": options.seed,
        }

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: HarnessCell, index: int) -> Sample:
        """The first request about a document; `answer` makes the others too."""
        request = self.tasks.requests(cell.task, index)[0]
        expected = {
            "task": cell.task,
            "document": index,
            "target": self.tasks.target(cell.task, index),
        }
        ids = tokenizer.encode(request.args[0])
        return Sample(np.asarray(ids, dtype=np.int64), expected, 0)

    def score(self, sample: Sample, text: str) -> Score:
        """Of a document with one request, which is answered by a text."""
        return self._score(sample, [text])

    def answer(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
    ) -> list[Score]:
        assert self._model is not None, "check comes first"
        self._model.decoder = decoder
        requests = [self._requests(sample) for sample in samples]
        responses: dict[int, Any] = {}
        by_kind: dict[str, list[Any]] = {}
        for request in (each for of_sample in requests for each in of_sample):
            by_kind.setdefault(request.request_type, []).append(request)
        for kind, of_kind in by_kind.items():
            found = getattr(self._model, kind)(of_kind)
            responses.update(zip(map(id, of_kind), found, strict=True))
        return [
            self._score(sample, [responses[id(request)] for request in of_sample])
            for sample, of_sample in zip(samples, requests, strict=True)
        ]

    def cheap(self, lengths: Sequence[int], samples: int) -> HarnessSuite:
        """Few documents of each task; the tasks have lengths of their own."""
        return HarnessSuite(replace(self.options, limit=float(samples)))

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        """A row of each metric of each task and group, as the harness reports them."""
        if not cells or "metric" in cells[0]:
            return list(cells)
        if self._rows[0] == cells:
            return self._rows[1]
        responses = {
            (row["task"], index): answer["measured"]["responses"]
            for row in cells
            for index, answer in enumerate(row["answers"])
        }
        found = self.tasks.results(responses)
        rows = [row for name in found["results"] for row in self._metrics(found, name)]
        self._rows = (list(cells), rows)
        return rows

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def table(self, rows: Sequence[Row]) -> Table:
        heads, lines = self.published(self.rows(rows))
        table = Table(title=self.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, head in enumerate(heads):
            table.add_column(head, justify="right" if index > 3 else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        heads = ["task", "examples", "metric", "filter", "value", "standard error", "n"]
        lines = []
        for row in self.rows(rows):
            shots, error, cut = row["num_fewshot"], row["stderr"], row["truncated_prompts"]
            lines.append(
                [
                    row["task"],
                    "" if shots is None else str(shots),
                    row["metric"],
                    row["filter"],
                    f"{row['value']:.4f}",
                    "" if error is None else f"{error:.4f}",
                    f"{row['n']} ({cut} prompts cut)" if cut else str(row["n"]),
                ]
            )
        return heads, lines

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        """A bar for each metric between 0 and 1, with its standard error."""
        shown = [row for row in self.rows(rows) if 0 <= row["value"] <= 1]
        figure = new_figure(7.0, 1.4 + 0.32 * max(1, len(shown)))
        axis = figure.subplots()
        places = range(len(shown))
        axis.barh(
            places,
            [row["value"] for row in shown],
            xerr=[row["stderr"] or 0.0 for row in shown],
            color="#3B6FB6",
            ecolor="#1A1A1A",
            capsize=2,
        )
        names = [f"{row['task']}: {row['metric']}, {row['filter']}" for row in shown]
        axis.set_yticks(places, names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("value, and its standard error")
        axis.set_title(title, fontsize=9)
        save_png(figure, path, dpi=150)

    def _requests(self, sample: Sample) -> list[Any]:
        return self.tasks.requests(sample.expected["task"], sample.expected["document"])

    def _score(self, sample: Sample, responses: Sequence[Any]) -> Score:
        task, document = sample.expected["task"], sample.expected["document"]
        answered: Answered = self.tasks.score(task, document, responses)
        written = [list(each) if isinstance(each, tuple) else each for each in responses]
        measured = {"responses": written, "metrics": answered.metrics}
        return Score(sample.expected, answered.text, answered.correct, measured)

    def _metrics(self, found: dict[str, Any], name: str) -> Iterator[Row]:
        """Rows of a task or a group in what the harness reports."""
        values = found["results"][name]
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            yield {
                "what": self.name,
                "task": name,
                "num_fewshot": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                "metric": metric,
                "filter": filter_name,
                "value": float(value),
                "stderr": error if isinstance(error, float) else None,
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                "n": values.get("sample_count", {}).get(key, values["sample_len"]),
                "truncated_prompts": self._truncated.get(name),
            }


def build(options: Config) -> HarnessSuite:
    """The suite."""
    return HarnessSuite(options)
