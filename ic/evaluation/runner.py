"""Evaluates a suite cell by cell: continues what was interrupted, shares the cells over processes.

A line is written as each cell ends. It holds the identity of the weights and of the suite's
settings, so that a file may hold cells of several and each evaluation finds its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ic.evaluation.shares import share_of_cells
from ic.evaluation.suite import C, Cell, Row, Score, Suite
from ic.files.json_lines import append_row, rank_file, read_rows, write_rows
from ic.inference.greedy import GreedyDecoder, OnCache, StoppedError
from ic.model import MLAForCausalLM
from ic.model.fingerprint import fingerprint


class Ranks(Protocol):
    """Processes that share the cells, each with the whole model: a Lightning strategy or Fabric."""

    @property
    def global_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self, name: str | None = None) -> None: ...


@torch.no_grad()
def run_suite(
    model: MLAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite[C],
    results_file: Path,
    on_cell: Callable[[C, Row], None] | None = None,
    on_cache: OnCache | None = None,
    *,
    ranks: Ranks | None = None,
    sharded: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Evaluate every cell that `results_file` does not hold yet for these weights and settings.

    Returns this suite's rows, old and new, in the suite's order; `on_cell` sees each, those of
    other processes at the end. With `ranks`, every process calls this and takes a share of the
    cells; each writes to a file of its own, which is merged at the end, or by the next evaluation
    if this one is interrupted. With `sharded`, the model or each prompt lies spread over all
    processes: every one of them calls this and runs the same cells, rank 0 alone reads and writes.
    `stop` is asked within each prompt; with `sharded` all processes have to get the same answer.

    Raises:
        StoppedError: it was stopped, on all processes alike; the cells that are done are kept.
        ValueError: what `Suite.check` refuses.
    """
    suite.check(tokenizer, model.config.max_position_embeddings)  # on every rank
    identity = {"model": fingerprint(model), "settings": settings_hash(suite)}
    rank, world = (ranks.global_rank, ranks.world_size) if ranks is not None else (0, 1)
    is_writer = not sharded or torch.distributed.get_rank() == 0
    own_file = rank_file(results_file, rank) if world > 1 else results_file
    cells = list(suite.cells())
    done: dict[C, Row] = {}
    if is_writer:
        results_file.parent.mkdir(parents=True, exist_ok=True)
        merge_rank_files(results_file, ranks)  # of an evaluation that was interrupted
        done = _rows_of(cells, results_file, identity)
    if sharded:
        box = [done]
        torch.distributed.broadcast_object_list(box)  # all have to skip the same cells
        done = box[0]
    was_training = model.training
    model.eval()
    decoder = GreedyDecoder(model, suite.prefill_chunk_tokens, on_cache, stop)
    missing = [cell for cell in cells if cell not in done]
    unseen = set(cells)

    def show(cell: C) -> None:
        unseen.remove(cell)
        if on_cell is not None:
            on_cell(cell, done[cell])

    for cell in cells:
        if cell in done:
            show(cell)
    with contextlib.suppress(StoppedError):
        for in_turn in share_of_cells(suite, missing, rank, world):
            for cell, row in _evaluate_in_turn(decoder, tokenizer, suite, in_turn):
                done[cell] = row = {**identity, **row}
                if is_writer:
                    append_row(own_file, row)
                show(cell)
    model.train(was_training)
    if world > 1:
        merge_rank_files(results_file, ranks)
        done = _rows_of(cells, results_file, identity)
        for cell in cells:
            if cell in unseen and cell in done:
                show(cell)
    if len(done) < len(cells):
        raise StoppedError
    return [done[cell] for cell in cells]


def settings_hash(suite: Suite[Any]) -> str:
    """Identity of the settings that shape a suite's samples."""
    return hashlib.sha256(json.dumps(suite.settings(), sort_keys=True).encode()).hexdigest()[:16]


def merge_rank_files(results_file: Path, ranks: Ranks | None = None) -> None:
    """Append the ranks' cells to `results_file` and remove their files; every rank calls this."""
    if ranks is not None:
        ranks.barrier("cells written")
    if ranks is None or ranks.global_rank == 0:
        files = sorted(results_file.parent.glob(f"{results_file.stem}.rank*.jsonl"))
        rows = [row for file in (results_file, *files) for row in read_rows(file)]
        if files:
            # A kill after a merge may have left files whose rows are already in.
            once = {json.dumps(row, sort_keys=True): row for row in rows}
            write_rows(results_file, list(once.values()))
        for file in files:
            file.unlink()
    if ranks is not None:
        ranks.barrier("cells merged")


def _rows_of(cells: Sequence[C], results_file: Path, identity: Mapping[str, str]) -> dict[C, Row]:
    """The rows that `results_file` holds for some of the cells."""
    names = [field.name for field in fields(cells[0])]
    by_key = {_key(asdict(cell), names): cell for cell in cells}
    return {
        by_key[key]: row
        for row in read_rows(results_file)
        if all(row.get(name) == value for name, value in identity.items())
        and (key := _key(row, names)) in by_key
    }


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


def _evaluate_in_turn(
    decoder: GreedyDecoder, tokenizer: PreTrainedTokenizerBase, suite: Suite[C], cells: list[C]
) -> Iterator[tuple[C, Row]]:
    """Cells of one length, sample by sample, each with its row as soon as that is complete."""
    scores: dict[C, list[Score]] = {cell: [] for cell in cells}
    seconds = dict.fromkeys(cells, 0.0)
    size = max(1, suite.tokens_per_batch // cells[0].length_tokens)
    for start in range(0, max(cell.samples for cell in cells), size):
        for cell in (cell for cell in cells if start < cell.samples):
            began = time.perf_counter()
            indices = range(start, min(start + size, cell.samples))
            samples = [suite.sample(tokenizer, cell, index) for index in indices]
            scores[cell] += suite.answer(decoder, tokenizer, samples)
            seconds[cell] += time.perf_counter() - began
            if len(scores[cell]) == cell.samples:
                yield cell, _row(cell, scores[cell], seconds[cell])


def _row(cell: Cell, scores: list[Score], seconds: float) -> Row:
    return {
        **asdict(cell),
        "n": len(scores),
        "correct": sum(score.correct for score in scores if score.correct is not None),
        "seconds": round(seconds, 3),
        "answers": [_written(score) for score in scores],
    }


def _written(score: Score) -> Row:
    row = asdict(score)
    return row if score.measured else {name: row[name] for name in row if name != "measured"}
