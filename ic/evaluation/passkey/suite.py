"""Passkey and needle retrieval by greedy decoding, resumable cell by cell."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ic.datamodules.needles import answer_keys
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.prompts import Prompt, build_prompt
from ic.evaluation.passkey.shares import share_of_cells
from ic.evaluation.runner import Ranks, merge_rank_files
from ic.files.json_lines import rank_file, read_rows
from ic.inference.greedy import GreedyDecoder, OnCache
from ic.model import MLAForCausalLM
from ic.model.fingerprint import fingerprint

_CELL_KEY = tuple(field.name for field in fields(Cell))


def evaluate_grid(
    model: MLAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    grid: PasskeyGridConfig,
    results_file: Path,
    on_cell: Callable[[Cell, dict[str, Any]], None] | None = None,
    on_cache: OnCache | None = None,
    *,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate every cell that `results_file` does not hold yet for these weights and settings.

    A line is written as each cell ends, so an interrupted evaluation continues where it stopped.
    Returns this grid's rows, old and new, in the grid's order; `on_cell` sees each, those of other
    processes at the end. With `ranks`, every process calls this and takes a share of the cells;
    each writes to a file of its own, which is merged at the end. With `sharded`, the model or each
    prompt lies spread over all processes: every one of them calls this and runs the same cells,
    rank 0 alone reads and writes.

    Raises:
        ValueError: a length that leaves no positions for the answer, or too short for the needles.
    """
    longest, positions = max(grid.lengths), model.config.max_position_embeddings
    for task in grid.tasks:  # before anything is computed, and on every rank
        shortest = Cell(task, min(grid.lengths), grid.depths[0], grid.fillers[0], 1)
        answer_tokens = build_prompt(tokenizer, grid, shortest, 0).answer_tokens
        if longest + answer_tokens > positions:
            raise ValueError(
                f"evaluation.lengths: {longest} tokens and {answer_tokens} of the answer, but the "
                f"model has {positions} positions (max_position_embeddings)"
            )
    identity = {"model": fingerprint(model), "settings": settings_hash(grid)}
    rank, world = (ranks.global_rank, ranks.world_size) if ranks is not None else (0, 1)
    is_writer = not sharded or torch.distributed.get_rank() == 0
    own_file = rank_file(results_file, rank) if world > 1 else results_file
    done: dict[Cell, dict[str, Any]] = {}
    if is_writer:
        results_file.parent.mkdir(parents=True, exist_ok=True)
        merge_rank_files(results_file, ranks)  # of an evaluation that was interrupted
        done = _rows_of(results_file, identity)
    if sharded:
        box = [done]
        torch.distributed.broadcast_object_list(box)  # all have to skip the same cells
        done = box[0]
    was_training = model.training
    model.eval()
    decoder = GreedyDecoder(model, grid.prefill_chunk_tokens, on_cache)
    cells = list(grid.cells())
    missing = [cell for cell in cells if cell not in done]
    unseen = set(cells)

    def show(cell: Cell) -> None:
        unseen.remove(cell)
        if on_cell is not None:
            on_cell(cell, done[cell])

    for cell in cells:
        if cell in done:
            show(cell)
    for together in share_of_cells(grid, missing, rank, world):
        for cell, row in _evaluate_together(decoder, tokenizer, grid, together):
            done[cell] = row = {**identity, **row}
            if is_writer:
                with own_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            show(cell)
    model.train(was_training)
    if world > 1:
        merge_rank_files(results_file, ranks)
        done = _rows_of(results_file, identity)
        for cell in cells:
            if cell in unseen:
                show(cell)
    return [done[cell] for cell in cells]


def _evaluate_together(
    decoder: GreedyDecoder,
    tokenizer: PreTrainedTokenizerBase,
    grid: PasskeyGridConfig,
    cells: list[Cell],
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells of one length, sample by sample, each with its row as soon as that is complete."""
    answers: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    seconds = dict.fromkeys(cells, 0.0)
    size = max(1, grid.tokens_per_batch // cells[0].length_tokens)
    for start in range(0, max(cell.samples for cell in cells), size):
        for cell in (cell for cell in cells if start < cell.samples):
            began = time.perf_counter()
            indices = range(start, min(start + size, cell.samples))
            answers[cell] += _answer(decoder, tokenizer, grid, cell, indices)
            seconds[cell] += time.perf_counter() - began
            if len(answers[cell]) == cell.samples:
                yield (
                    cell,
                    {
                        **cell.key,
                        "n": cell.samples,
                        "correct": sum(answer["correct"] for answer in answers[cell]),
                        "seconds": round(seconds[cell], 3),
                        "answers": answers[cell],
                    },
                )


def _answer(
    decoder: GreedyDecoder,
    tokenizer: PreTrainedTokenizerBase,
    grid: PasskeyGridConfig,
    cell: Cell,
    indices: range,
) -> list[dict[str, Any]]:
    prompts = [build_prompt(tokenizer, grid, cell, index) for index in indices]
    by_length: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.ids), []).append(prompt)
    given: list[dict[str, Any]] = []
    for group in by_length.values():
        ids = torch.from_numpy(np.stack([p.ids for p in group])).to(decoder.model.device)
        # One token more than the answer: "12345" and "123456" are different answers.
        out = decoder.answers(ids, max(p.answer_tokens for p in group) + 1)
        for prompt, tokens in zip(group, out.tolist(), strict=True):
            text = str(tokenizer.decode(tokens))
            right = answer_keys(text)[: len(prompt.expected)] == prompt.expected
            given.append({"expected": prompt.expected, "text": text, "correct": right})
    return given


def _rows_of(results_file: Path, identity: Mapping[str, str]) -> dict[Cell, dict[str, Any]]:
    return {
        Cell(**{name: row[name] for name in _CELL_KEY}): row
        for row in read_rows(results_file)
        if all(row.get(key) == value for key, value in identity.items())
    }


def settings_hash(grid: PasskeyGridConfig) -> str:
    """Identity of what shapes a sample; lengths, depths and counts are the cells' own keys."""
    shaping = {key: asdict(grid)[key] for key in ("num_needles", "split", "seed")}
    # Cells that were written before there was a choice stay valid.
    if grid.prompt != "plain":
        shaping["prompt"] = grid.prompt
    if grid.share_haystack:
        shaping["share_haystack"] = grid.depths  # a haystack holds the keys of several depths
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]
