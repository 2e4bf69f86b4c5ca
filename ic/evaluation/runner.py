"""Evaluates a suite sample by sample: continues what was interrupted, shares it over processes.

Lines are written as samples are answered (`ic.evaluation.answered`). They hold the identity of the
weights, of the suite's settings, of the tokenizer and of what ends an answer, so
that a file may hold samples of several and each evaluation finds its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ic.datamodules.tokenizers import tokenizer_fingerprint
from ic.evaluation.answered import (
    IDENTITY,
    Ranks,
    cell_fields,
    cell_row,
    merge_rank_files,
    read_samples,
    sample_row,
)
from ic.evaluation.sample_cache import SampleCache
from ic.evaluation.shares import BatchSize, Part, batch_of_tokens, share_of_samples
from ic.evaluation.suite import BATCH_TOKENS, C, Decoder, Row, Sample, Suite
from ic.files.json_lines import append_rows, rank_file
from ic.files.run_folder import earlier_cells_file
from ic.inference.batch_memory import free_bytes, prompts_at_once
from ic.inference.greedy import GreedyDecoder, OnCache, StoppedError
from ic.inference.model_facts import end_tokens, positions_of
from ic.model.fingerprint import fingerprint

# Of each cell, the rows of its answered samples by their indices.
Answered = dict[C, dict[int, Row]]


@torch.no_grad()
def run_suite(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite[C],
    file: Path,
    on_sample: Callable[[C, Row, bool], None] | None = None,
    on_cache: OnCache | None = None,
    *,
    ranks: Ranks | None = None,
    sharded: bool = False,
    stop: Callable[[], bool] = lambda: False,
    sample_cache: Path | None = None,
) -> list[Row]:
    """Answer every sample that `file` does not hold yet for these weights and settings.

    Returns a row for each of the suite's cells, in the suite's order: the cell's fields, `n`,
    `correct`, `seconds` and `answers`. `on_sample` sees each sample's row, and whether it was
    answered before, those of other processes at the end. With `ranks`, every process calls this and
    takes a share of the samples; each writes to a file of its own, which is merged at the end, or
    by the next evaluation if this one is interrupted. With `sharded`, the model or each prompt lies
    spread over all processes: every one of them calls this and answers the same samples, rank 0
    alone reads and writes. `stop` is asked within each prompt; with `sharded` all processes have to
    get the same answer.

    Args:
        file: `samples.jsonl` of a suite's folder.
        sample_cache: folder that keeps samples that were drawn, of suites that say it pays.

    Raises:
        StoppedError: it was stopped, on all processes alike; the samples that are done are kept.
        ValueError: what `Suite.check` refuses.
    """
    suite.check(tokenizer, positions_of(model.config))  # on every rank
    identity = identity_of(model, fingerprint(model), tokenizer, suite)
    rank, world = (ranks.global_rank, ranks.world_size) if ranks is not None else (0, 1)
    is_writer = not sharded or torch.distributed.get_rank() == 0
    own_file = rank_file(file, rank) if world > 1 else file
    cells = list(suite.cells())
    done: Answered[C] = {cell: {} for cell in cells}
    if is_writer:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Of an evaluation that was interrupted.
        merge_rank_files(file, ranks, suite.keyed_files(file))
        done = _answered_before(cells, file, identity)
    if sharded:
        box = [done]
        torch.distributed.broadcast_object_list(box)  # all have to skip the same samples
        done = box[0]
    suite.begin(own_file if is_writer else None)
    missing = {
        cell: [index for index in range(cell.samples) if index not in done[cell]] for cell in cells
    }

    def show(cell: C, rows: Iterable[Row], before: bool = False) -> None:
        if on_sample is not None:
            for row in rows:
                on_sample(cell, row, before)

    for cell in cells:
        show(cell, done[cell].values(), before=True)
    was_training = model.training
    model.eval()
    ends = end_tokens(model, tokenizer)
    decoder = GreedyDecoder(model, suite.prefill_chunk_tokens, on_cache, stop, ends)
    draw: Callable[[C, int], Sample] = partial(suite.sample, tokenizer)
    if sample_cache is not None and suite.cached:
        draw = SampleCache(sample_cache, suite, tokenizer).sample
    batch_size = _batch_size(model, suite, ranks, world, sharded)
    with contextlib.suppress(StoppedError):
        for part in share_of_samples(suite, missing, rank, world, batch_size):
            size = batch_size(next(iter(part)))
            for cell, rows in _answer(decoder, tokenizer, suite, draw, part, identity, size):
                done[cell] |= {row["index"]: row for row in rows}
                if is_writer:
                    append_rows(own_file, rows)
                show(cell, rows)
    model.train(was_training)
    if world > 1:
        merge_rank_files(file, ranks, suite.keyed_files(file))
        before, done = done, _answered_before(cells, file, identity)
        for cell in cells:
            show(cell, [row for index, row in done[cell].items() if index not in before[cell]])
    if any(len(done[cell]) < cell.samples for cell in cells):
        raise StoppedError
    return [cell_row(list(done[cell].values())) for cell in cells]


def identity_of(
    model: Any, weights: str, tokenizer: PreTrainedTokenizerBase, suite: Suite[Any]
) -> dict[str, str]:
    """What samples are told apart by, a value for each name of `answered.IDENTITY`.

    Args:
        weights: `fingerprint` of the model.
    """
    return {
        "model": weights,
        "settings": settings_hash(suite),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "ends": ",".join(map(str, sorted(end_tokens(model, tokenizer)))),
    }


def settings_hash(suite: Suite[Any]) -> str:
    """Identity of the settings that shape a suite's samples."""
    return hashlib.sha256(json.dumps(suite.settings(), sort_keys=True).encode()).hexdigest()[:16]


def _answered_before(cells: Sequence[C], file: Path, identity: Mapping[str, str]) -> Answered[C]:
    """What `file`, and cells of an earlier version beside it, hold of these cells."""
    by_key = {_key(asdict(cell)): cell for cell in cells}
    done: Answered[C] = {cell: {} for cell in cells}
    for path in (earlier_cells_file(file), file):
        for row in read_samples(path):
            cell = by_key.get(_key(cell_fields(row)))
            same = all(row.get(name) in (identity[name], None) for name in IDENTITY)
            if cell is not None and same:
                done[cell].setdefault(row["index"], row)
    return done


def _batch_size(
    model: Any, suite: Suite[C], ranks: Ranks | None, world: int, sharded: bool
) -> BatchSize[C]:
    """How many samples of a cell are answered together: as asked for, or as many as fit.

    Ranks that share the samples cut them into the same batches, by the memory of the first of them,
    and each can have a batch of every cell. Where a model or its prompts lie spread over ranks,
    what fits is not computed.
    """
    if suite.tokens_per_batch is not None:
        return batch_of_tokens(suite.tokens_per_batch)
    free = free_bytes(model)
    if free is None or sharded:
        return batch_of_tokens(BATCH_TOKENS)
    if ranks is not None and world > 1:
        free = ranks.broadcast(free)
    held: int = free

    def fit(cell: C) -> int:
        longest = cell.length_tokens
        most = prompts_at_once(model, longest, suite.prefill_chunk_tokens, held)
        return min(most, -(-cell.samples // world))

    return fit


def _key(fields: Row) -> tuple[Any, ...]:
    return tuple(sorted(fields.items()))


def _answer(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite[C],
    draw: Callable[[C, int], Sample],
    part: Part[C],
    identity: Mapping[str, str],
    size: int,
) -> Iterator[tuple[C, list[Row]]]:
    """Rows of samples of cells of one length, batch by batch, cells in turn.

    Batches begin at the same indices whatever was answered before.
    """
    for start in range(0, max(cell.samples for cell in part), size):
        for cell, missing in part.items():
            indices = [index for index in missing if start <= index < start + size]
            if not indices:
                continue
            began = time.perf_counter()
            samples = [draw(cell, index) for index in indices]
            scores = suite.answer(decoder, tokenizer, samples)
            seconds = (time.perf_counter() - began) / len(indices)
            yield (
                cell,
                [
                    sample_row(identity, cell, index, score, seconds)
                    for index, score in zip(indices, scores, strict=True)
                ],
            )
