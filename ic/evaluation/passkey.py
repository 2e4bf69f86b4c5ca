"""Passkey and needle retrieval by greedy decoding, resumable cell by cell."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from ic.datamodules.byte_tokenizer import ByteTokenizer
from ic.datamodules.needle_pairs import answer_of, question_of
from ic.datamodules.needles import NeedleSample, answer_keys, draw_filler, draw_sample
from ic.evaluation.grid import CONTROL, Cell, PasskeyGridConfig
from ic.model import LatentCache, MLAForCausalLM

# Sees each cache at its largest; the memory profiler counts it.
OnCache = Callable[[LatentCache], None]


@dataclass(frozen=True)
class Prompt:
    """Token ids (length,) int64 that end right before the answer, and the keys expected."""

    ids: np.ndarray
    expected: list[str]
    answer_tokens: int


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, grid: PasskeyGridConfig, cell: Cell, index: int
) -> Prompt:
    """Sample `index` of a cell: exactly `cell.length_tokens` tokens, the needle at its depth.

    A sample depends on the grid's seed and its own cell and index alone.

    Raises:
        ValueError: the needles and the question do not fit in the length.
    """
    rng = np.random.default_rng(
        [grid.seed, cell.length_tokens, round(1e6 * (1 + cell.depth)), index,
         *f"{cell.task} {cell.filler}".encode()]
    )  # fmt: skip
    sample = draw_sample(rng, cell.task, grid.split, grid.num_needles)
    control = cell.depth == CONTROL
    needles = [] if control else [encode(tokenizer, sample.needle)]
    others = [encode(tokenizer, text) for text in sample.others]
    if grid.prompt == "chat":
        before, question, answer = _chat_turn(tokenizer, sample)
    else:
        before, answer = np.empty(0, dtype=np.int64), sample.answer
        question = encode(tokenizer, sample.question)
    room = cell.length_tokens - len(before) - len(question) - sum(map(len, needles + others))
    if room < 0:
        raise ValueError(
            f"evaluation.lengths: {cell.length_tokens} tokens cannot hold the task {cell.task} "
            f"with {grid.num_needles} needles; it takes {cell.length_tokens - room}"
        )
    filler = _filler_tokens(rng, tokenizer, cell.filler, room)
    places = [round(cell.depth * room)] * len(needles) + list(
        rng.integers(0, room + 1, len(others))
    )
    if cell.task == "multi_value":
        places.sort()  # the values are asked for in the order of the text
    ids = _insert(filler, needles + others, places)
    return Prompt(
        np.concatenate([before, ids, question]), sample.keys, len(encode(tokenizer, answer))
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids (n,) int64 without special tokens."""
    if isinstance(tokenizer, ByteTokenizer):  # a million bytes in a moment instead of seconds
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


@torch.no_grad()  # not inference mode: sharded parameters gathered in it could not be trained
def greedy_answers(
    model: MLAForCausalLM,
    ids_BT: Tensor,
    new_tokens: int,
    prefill_chunk_tokens: int,
    on_cache: OnCache | None = None,
) -> Tensor:
    """Greedy continuation (B, new_tokens) of prompts of equal length, over a latent cache."""
    batch, length = ids_BT.shape
    cache = model.model.new_cache(length + new_tokens)
    for chunk in ids_BT.split(prefill_chunk_tokens, dim=1):
        logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    out = ids_BT.new_empty(batch, new_tokens)
    for i in range(new_tokens):
        out[:, i] = logits[:, -1].argmax(-1)
        if i + 1 < new_tokens:
            logits = model(out[:, i : i + 1], past_key_values=cache, use_cache=True).logits
    if on_cache is not None:
        on_cache(cache)
    return out


def evaluate_cell(
    model: MLAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    grid: PasskeyGridConfig,
    cell: Cell,
    on_cache: OnCache | None = None,
) -> dict[str, Any]:
    """One row: the cell's key, n, correct, the answers given, seconds."""
    began = time.perf_counter()
    prompts = [build_prompt(tokenizer, grid, cell, i) for i in range(cell.samples)]
    rows: list[dict[str, Any]] = []
    size = max(1, grid.tokens_per_batch // cell.length_tokens)
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        by_length: dict[int, list[Prompt]] = {}
        for prompt in some:
            by_length.setdefault(len(prompt.ids), []).append(prompt)
        for group in by_length.values():
            ids = torch.from_numpy(np.stack([p.ids for p in group])).to(model.device)
            # One token more than the answer: "12345" and "123456" are different answers.
            new_tokens = max(p.answer_tokens for p in group) + 1
            out = greedy_answers(model, ids, new_tokens, grid.prefill_chunk_tokens, on_cache)
            for prompt, tokens in zip(group, out.tolist(), strict=True):
                text = str(tokenizer.decode(tokens))
                given = answer_keys(text)[: len(prompt.expected)]
                rows.append(
                    {"expected": prompt.expected, "text": text, "correct": given == prompt.expected}
                )
    return {
        **cell.key,
        "n": len(rows),
        "correct": sum(row["correct"] for row in rows),
        "seconds": round(time.perf_counter() - began, 3),
        "answers": rows,
    }


def evaluate_grid(
    model: MLAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    grid: PasskeyGridConfig,
    results_file: Path,
    on_cell: Callable[[Cell, dict[str, Any]], None] | None = None,
    on_cache: OnCache | None = None,
    sharded: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate every cell that `results_file` does not hold yet for these weights and settings.

    A line is appended as each cell ends, so an interrupted evaluation continues where it stopped.
    Returns this grid's rows, old and new, in the grid's order. With `sharded`, the model lies
    spread over all processes: every one of them calls this and runs the same cells, rank 0 alone
    reads and writes the file.

    Raises:
        ValueError: a length beyond the model's positions.
    """
    longest = max(grid.lengths)
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"evaluation.lengths: {longest} tokens, but the model has "
            f"{model.config.max_position_embeddings} positions (max_position_embeddings)"
        )
    identity = {"model": fingerprint(model), "settings": settings_hash(grid)}
    is_writer = not sharded or torch.distributed.get_rank() == 0
    earlier = read_rows(results_file) if is_writer else []
    if sharded:
        box = [earlier]
        torch.distributed.broadcast_object_list(box)  # all have to skip the same cells
        earlier = box[0]
    names = ("task", "length_tokens", "depth", "filler", "samples")
    done = {
        json.dumps({key: row[key] for key in names}): row
        for row in earlier
        if all(row.get(key) == value for key, value in identity.items())
    }
    if is_writer:
        results_file.parent.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    rows = []
    for cell in grid.cells():
        row = done.get(json.dumps(cell.key))
        if row is None:
            row = {**identity, **evaluate_cell(model, tokenizer, grid, cell, on_cache)}
            if is_writer:
                with results_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
        if on_cell is not None:
            on_cell(cell, row)
    model.train(was_training)
    return rows


def read_rows(results_file: Path) -> list[dict[str, Any]]:
    """Rows of a cells file; a last line that a crash cut short is dropped from the file.

    Raises:
        ValueError: any other line that is not JSON.
    """
    if not results_file.is_file():
        return []
    rows, lines = [], results_file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                partial = results_file.with_suffix(".partial")
                partial.write_text("".join(lines[:-1]))
                partial.replace(results_file)
                break
            raise ValueError(
                f"{results_file}, line {number}: not JSON ({error}); repair or delete the file"
            ) from error
    return rows


def fingerprint(model: torch.nn.Module) -> str:
    """Identity of the weights: exact integer sums over their bits, the same on every device.

    Collective if the weights are `DTensor`s.
    """
    return fingerprint_state(model.state_dict())


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """`fingerprint` of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
            tensor.element_size(), torch.int8
        )
        bits = tensor.detach().contiguous().view(kind).flatten().long()
        weights = torch.arange(len(bits), device=bits.device) % 8191 + 1
        digest.update(
            f"{name}{tuple(tensor.shape)}{int(bits.sum())}{int((bits * weights).sum())}".encode()
        )
    return digest.hexdigest()[:16]


def _chat_turn(
    tokenizer: PreTrainedTokenizerBase, sample: NeedleSample
) -> tuple[np.ndarray, np.ndarray, str]:
    """Token ids before the filler and from the question on, and the answer expected."""
    (key,), name = sample.keys, re.findall(r"for (\w+) is", sample.needle)[0]
    marker = "\x00"  # stands for the filler, which need not be rendered to count its tokens
    turn = [{"role": "user", "content": marker + question_of(name)}]
    rendered = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, _, after = rendered.partition(marker)
    ids = [
        np.asarray(tokenizer(part, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for part in (before, after)
    ]
    return ids[0], ids[1], answer_of(name, key)


def settings_hash(grid: PasskeyGridConfig) -> str:
    """Identity of what shapes a sample; lengths, depths and counts are the cells' own keys."""
    shaping = {key: asdict(grid)[key] for key in ("num_needles", "split", "seed")}
    if grid.prompt != "plain":  # cells written before there was a choice stay valid
        shaping["prompt"] = grid.prompt
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def _filler_tokens(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, kind: str, count: int
) -> np.ndarray:
    if isinstance(tokenizer, ByteTokenizer):
        return draw_filler(rng, kind, count).astype(np.int64)
    # A token is at least a byte of text; tokenise generously and cut.
    text = draw_filler(rng, kind, 8 * count).tobytes().decode()
    ids = encode(tokenizer, text)
    return np.resize(ids, count)


def _insert(filler: np.ndarray, pieces: Iterable[np.ndarray], places: list[int]) -> np.ndarray:
    order = sorted(zip(places, range(len(places)), pieces, strict=True), key=lambda item: item[:2])
    out, last = [], 0
    for place, _, piece in order:
        out += [filler[last:place], piece]
        last = place
    return np.concatenate([*out, filler[last:]])
