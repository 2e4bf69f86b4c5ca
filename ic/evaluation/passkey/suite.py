"""Passkey and needle retrieval: keys hidden in filler of an exact length, asked for at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ic.datamodules.needles import answer_keys
from ic.evaluation.by_depth import depth_rows, is_control
from ic.evaluation.by_depth_figure import draw_by_depth
from ic.evaluation.by_depth_tables import document_table, terminal_table
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.prompts import build_prompt
from ic.evaluation.passkey.shares import group_by_haystack, work_in_haystacks
from ic.evaluation.suite import Row, Sample, Score, Suite


def build(config: PasskeyGridConfig) -> PasskeySuite:
    return PasskeySuite(config)


class PasskeySuite(Suite[Cell]):
    """A passkey grid."""

    name = "passkey"
    title = "passkey retrieval on synthetic text"
    picture = "heatmap"

    def __init__(self, grid: PasskeyGridConfig) -> None:
        self.grid = grid
        self.tokens_per_batch = grid.tokens_per_batch
        self.prefill_chunk_tokens = grid.prefill_chunk_tokens

    def cells(self) -> Iterator[Cell]:
        return self.grid.cells()

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: Cell, index: int) -> Sample:
        return build_prompt(tokenizer, self.grid, cell, index)

    def score(self, sample: Sample, text: str) -> Score:
        right = answer_keys(text)[: len(sample.expected)] == sample.expected
        return Score(sample.expected, text, right)

    def settings(self) -> dict[str, Any]:
        shaping = {key: asdict(self.grid)[key] for key in ("num_needles", "split", "seed")}
        # Cells that were written before there was a choice stay valid.
        if self.grid.prompt != "plain":
            shaping["prompt"] = self.grid.prompt
        if self.grid.share_haystack:
            # A haystack holds the keys of several depths.
            shaping["share_haystack"] = self.grid.depths
        return shaping

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        grid, longest = self.grid, max(self.grid.lengths)
        for task in grid.tasks:
            shortest = Cell(task, min(grid.lengths), grid.depths[0], grid.fillers[0], 1)
            answer_tokens = self.sample(tokenizer, shortest, 0).new_tokens - 1
            if longest + answer_tokens > positions:
                raise ValueError(
                    f"evaluation.lengths: {longest} tokens and {answer_tokens} of the answer, but "
                    f"the model has {positions} positions (max_position_embeddings)"
                )

    def cheap(self, lengths: Sequence[int], samples: int) -> PasskeySuite:
        """Samples a cell and filler, none without a needle, on the keys for validation."""
        return PasskeySuite(
            replace(
                self.grid,
                lengths=list(lengths),
                samples=samples,
                samples_by_length={},
                control_samples=0,
                split="validation",
            )
        )

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        share = self.grid.share_haystack
        return group_by_haystack(self.grid, cells) if share else super().groups(cells)

    def work(self, cells: Sequence[Cell]) -> float:
        share = self.grid.share_haystack
        return work_in_haystacks(self.grid, cells) if share else super().work(cells)

    def rows(self, cells: Sequence[Row]) -> list[Row]:
        """One row a task, length and depth, fillers pooled; depth `control` has no needle."""
        return depth_rows(cells, self.name)

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if not is_control(row)]

    def table(self, rows: Sequence[Row]) -> Table:
        title = "passkey retrieval, greedy decoding, synthetic data"
        return terminal_table(rows, title=title)

    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        return document_table(rows)

    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        draw_by_depth(rows, path, title=title, trained_length=trained_length)
