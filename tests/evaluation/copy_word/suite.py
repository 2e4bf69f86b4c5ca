"""Words to be copied; an answer counts by the share of its letters that are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ic.evaluation.statistics import pool
from ic.evaluation.suite import Row, Sample, Score, Suite
from ic.files.atomic_write import replacing
from tests.evaluation.copy_word.grid import Cell, Config


class CopyWord(Suite[Cell]):
    """Words to be copied."""

    name = "copy_word"
    title = "words copied"
    picture = "words"
    prefill_chunk_tokens = 48

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokens_per_batch = 2 * max(config.lengths)

    def cells(self) -> Iterator[Cell]:
        return self.config.cells()

    def sample(self, tokenizer: Any, cell: Cell, index: int) -> Sample:
        seed = [self.config.seed, cell.letters, cell.length_tokens, index]
        word = np.random.default_rng(seed).integers(97, 123, cell.letters, dtype=np.uint8)
        text = word.tobytes().decode()
        ids = tokenizer(f" {text}=", add_special_tokens=False)["input_ids"]
        dots = [ord(".")] * (cell.length_tokens - len(ids))
        return Sample(np.array(dots + ids), text, cell.letters)

    def score(self, sample: Sample, text: str) -> Score:
        right = [a == b for a, b in zip(sample.expected, text, strict=False)]
        return Score(sample.expected, text, sum(right) / len(sample.expected))

    def settings(self) -> dict[str, Any]:
        return {"seed": self.config.seed}

    def check(self, tokenizer: Any, positions: int) -> None:
        longest = max(self.config.lengths) + max(self.config.letters)
        if longest > positions:
            raise ValueError(f"copy_word: {longest} tokens, but the model has {positions}")

    def cheap(self, lengths: Sequence[int], samples: int) -> CopyWord:
        return CopyWord(replace(self.config, lengths=list(lengths), samples=samples, seed=1))

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        pooled = pool(cells, "length_tokens")
        return [
            {"what": self.name, "length_tokens": length, **accuracy.columns}
            for (length,), accuracy in pooled.items()
        ]

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def table(self, rows: Sequence[Row]) -> Table:
        table = Table("tokens", "right", title="words copied")
        for (length,), accuracy in pool(rows, "length_tokens").items():
            table.add_row(str(length), str(accuracy))
        return table

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        found = pool(rows, "length_tokens").items()
        return ["tokens", "right"], [[str(length), str(right)] for (length,), right in found]

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        from matplotlib.figure import Figure

        figure = Figure()
        axis = figure.subplots()
        shares = pool(rows, "length_tokens")
        axis.bar([str(length) for (length,) in shares], [right.share for right in shares.values()])
        axis.set_title(title)
        with replacing(path) as partial:
            figure.savefig(partial, format="png")


def build(config: Config) -> CopyWord:
    return CopyWord(config)
