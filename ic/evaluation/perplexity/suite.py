"""Perplexity by position: how well each token of a long document is predicted from what is before.

A model that uses its context predicts better the more of it there is: the curve of one pass over
the whole document (`full`) falls, while that of a sliding window stays level behind the window's
length. Where `full` rises above `sliding`, the model would do better to forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.evaluation.by_length import SuiteByLength
from ic.evaluation.options import TaskCell
from ic.evaluation.perplexity.curve import (
    WHOLE,
    curve_rows,
    document_table,
    perplexity_text,
    terminal_table,
)
from ic.evaluation.perplexity.documents import Documents
from ic.evaluation.perplexity.figure import draw_curves
from ic.evaluation.perplexity.grid import FULL, SLIDING, TASKS, Config, windows
from ic.evaluation.suite import BATCH_TOKENS, Decoder, Row, Sample, Score


def build(config: Config) -> PerplexitySuite:
    return PerplexitySuite(config)


class PerplexitySuite(SuiteByLength[Config]):
    """Perplexity by position. Nothing is generated, and nothing is right or wrong."""

    name = "perplexity"
    title = "perplexity by position"
    synthetic = "nothing, if the files of suite.perplexity.files are not"
    answering = "Nothing is generated"
    picture = "perplexity"

    def __init__(self, options: Config) -> None:
        super().__init__(options)
        self.documents = Documents(options)

    def tasks(self) -> Sequence[str]:
        return [task for task in TASKS if task in self.options.tasks]

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: TaskCell, index: int) -> Sample:
        document = self.documents.of_length(tokenizer, cell.length_tokens)[index]
        edges = self.options.edges(cell.length_tokens)
        expected = {
            "task": cell.task,
            "document": document.name,
            "edges": edges,
            "bytes": _sums(document.bytes_T, edges),
        }
        return Sample(document.ids_T.astype(np.int64), expected, 0)

    def answer(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
    ) -> list[Score]:
        """The losses of the samples' tokens, summed in buckets of positions."""
        ids_BT = torch.from_numpy(np.stack([sample.ids for sample in samples]))
        if samples[0].expected["task"] == FULL:
            losses_BT = decoder.losses(ids_BT)
        else:
            losses_BT = torch.stack([self._sliding(decoder, ids_T) for ids_T in ids_BT])
        # float64: a million losses are summed; a 0 stands for the first token, which has none.
        nats_BT = np.pad(losses_BT.double().numpy(), ((0, 0), (1, 0)))
        scores = []
        for sample, nats_T in zip(samples, nats_BT, strict=True):
            edges = sample.expected["edges"]
            sliding = sample.expected["task"] == SLIDING
            measured = {
                "window_tokens": self.options.window_tokens if sliding else None,
                "edges": edges,
                "nats": _sums(nats_T, edges),
                "bytes": sample.expected["bytes"],
            }
            scores.append(Score(sample.expected["document"], "", None, measured))
        return scores

    def _sliding(self, decoder: Decoder, ids_T: Tensor) -> Tensor:
        """Losses (T - 1,) of tokens that each see at most what its window holds before them."""
        window = self.options.window_tokens
        spans = windows(len(ids_T), window, self.options.stride_tokens)
        size = max(1, (self.options.tokens_per_batch or BATCH_TOKENS) // window)
        parts: list[Tensor] = []
        for (width, new), alike in groupby(spans, key=lambda span: (span[1] - span[0], span[2])):
            firsts = [first for first, _, _ in alike]
            for start in range(0, len(firsts), size):
                batch = [ids_T[first : first + width] for first in firsts[start : start + size]]
                losses_BS, _ = decoder.targets(torch.stack(batch), max(1, width - new))
                parts.append(losses_BS.flatten())
        return torch.cat(parts)

    def score(self, sample: Sample, text: str) -> Score:
        raise NotImplementedError("perplexity scores tokens, not answers")

    def settings(self) -> dict[str, Any]:
        names = ["seed", "text_column", "document_unit", "window_tokens", "stride_tokens"]
        names += ["buckets", "bucket_tokens"]
        options = asdict(self.options)
        return {"files": self.documents.digests, **{name: options[name] for name in names}}

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        """Also reads the documents, so that too few of them are found out at once."""
        options = self.options
        longest = max(options.lengths)
        if FULL in options.tasks:
            options.check_positions(positions, "choose shorter lengths, or tasks=[sliding]")
        if SLIDING in options.tasks and options.window_tokens > positions:
            raise ValueError(
                f"{options.key('window_tokens')}: the model has {positions:,} positions "
                "(max_position_embeddings); choose a smaller window"
            )
        self.documents.of_length(tokenizer, longest)

    def cheap(self, lengths: Sequence[int], samples: int) -> Self:
        options = self.options
        window = min(options.window_tokens, *lengths)
        return type(self)(
            replace(
                options,
                lengths=list(lengths),
                samples=samples,
                samples_by_length={},
                window_tokens=window,
                stride_tokens=min(options.stride_tokens, window - 1),
                seed=options.seed + 1,
            )
        )

    def work(self, cells: Sequence[TaskCell]) -> float:
        """Each token of a sliding window sees the window, not the whole text."""
        seen = {FULL: lambda length: length, SLIDING: lambda _: self.options.window_tokens}
        return float(
            sum(
                cell.samples * cell.length_tokens * seen[cell.task](cell.length_tokens)
                for cell in cells
            )
        )

    def progress_text(self, row: Row) -> str:
        (whole,) = (each for each in curve_rows([row]) if each["position"] == WHOLE)
        documents = f"{row['n']} document{'' if row['n'] == 1 else 's'}"
        return f"perplexity {perplexity_text(whole['perplexity'])} of {documents}"

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        return curve_rows(cells)

    def table(self, rows: Sequence[Row]) -> Table:
        return terminal_table(rows, self.title)

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        return document_table(rows)

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        draw_curves(rows, path, title=title, trained_length=trained_length)


def _sums(values_T: np.ndarray, edges: Sequence[int]) -> list[Any]:
    """Sums of the values from each edge to the next, the last edge being the end."""
    sums: list[Any] = np.add.reduceat(values_T, edges[:-1]).tolist()
    return sums
