"""Prompts of the passkey grid: filler of an exact length, needles at their depths, the question."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.needle_pairs import answer_of, question_of
from ic.datamodules.needles import (
    NeedleSample,
    ask_named,
    draw_filler,
    draw_keys,
    draw_names,
    draw_sample,
    named_needle,
)
from ic.evaluation.framing import encode, frame_prompt
from ic.evaluation.options import CONTROL
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.shares import haystack_of, num_haystacks
from ic.evaluation.suite import Sample
from ic.model.byte_tokenizer import ByteTokenizer


@dataclass(frozen=True)
class _Draw:
    """A sample, the statements to hide and their depths (None: anywhere), and what draws the rest.

    `filler_tokens` is drawn and then cut to the room there is.
    """

    rng: np.random.Generator
    sample: NeedleSample
    statements: list[str]
    depths: list[float | None]
    filler_tokens: int | None = None


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, grid: PasskeyGridConfig, cell: Cell, index: int
) -> Sample:
    """Sample `index` of a cell: exactly `cell.length_tokens` tokens, the needle at its depth.

    A sample depends on the grid's seed and its own cell and index alone; with
    `grid.share_haystack` its filler and its distractors do not depend on the depth.

    Raises:
        ValueError: the needles and the question do not fit in the length.
    """
    draw = (_draw_shared if grid.share_haystack else _draw)(grid, cell, index)
    needles = [encode(tokenizer, text) for text in draw.statements]
    if grid.prompt == "chat":
        (key,) = draw.sample.keys
        frame = frame_prompt(tokenizer, "chat", question_of(draw.sample.name))
        before, question, answer = frame.before, frame.after, answer_of(key)
    else:
        before, answer = np.empty(0, dtype=np.int64), draw.sample.answer
        question = encode(tokenizer, draw.sample.question)
    room = cell.length_tokens - len(before) - len(question) - sum(map(len, needles))
    if room < 0:
        raise ValueError(
            f"evaluation.lengths: {cell.length_tokens} tokens cannot hold the task {cell.task} "
            f"with {grid.num_needles} needles; it takes {cell.length_tokens - room}"
        )
    filler = _filler_tokens(draw.rng, tokenizer, cell.filler, draw.filler_tokens or room)[:room]
    anywhere = iter(draw.rng.integers(0, room + 1, draw.depths.count(None)).tolist())
    places = [next(anywhere) if depth is None else round(depth * room) for depth in draw.depths]
    if cell.task == "multi_value":
        places.sort()  # the values are asked for in the order of the text
    ids = np.concatenate([before, _insert(filler, needles, places), question])
    # One token more than the answer: "12345" and "123456" are different answers.
    return Sample(ids, draw.sample.keys, len(encode(tokenizer, answer)) + 1)


def _rng(grid: PasskeyGridConfig, cell: Cell, index: int, which: int) -> np.random.Generator:
    return np.random.default_rng(
        [grid.seed, cell.length_tokens, which, index, *f"{cell.task} {cell.filler}".encode()]
    )


def _draw(grid: PasskeyGridConfig, cell: Cell, index: int) -> _Draw:
    rng = _rng(grid, cell, index, round(1e6 * (1 + cell.depth)))
    sample = draw_sample(rng, cell.task, grid.split, grid.num_needles)
    needle, depth = ([], []) if cell.depth == CONTROL else ([sample.needle], [cell.depth])
    return _Draw(rng, sample, [*needle, *sample.others], [*depth, *[None] * len(sample.others)])


def _draw_shared(grid: PasskeyGridConfig, cell: Cell, index: int) -> _Draw:
    haystack = haystack_of(grid, cell)
    # Above the numbers of `_draw`, which end at depth 1.
    rng = _rng(grid, cell, index, 3_000_000 + haystack)
    if cell.task == "single":
        own = _draw(grid, cell, index)
        # The control has no needle but more filler: cut from as much, it begins alike.
        return _Draw(rng, own.sample, own.statements, own.depths, cell.length_tokens)
    held = grid.num_needles + 1
    # One more than the haystack holds: the control asks for that.
    keys, names = draw_keys(rng, held + 1, grid.split), draw_names(rng, held + 1)
    hidden_at = grid.depths[haystack :: num_haystacks(grid, cell)]
    asked = held if cell.depth == CONTROL else hidden_at.index(cell.depth)
    depths = [*hidden_at, *[None] * (held - len(hidden_at))]
    statements = [named_needle(n, k) for n, k in zip(names[:held], keys[:held], strict=True)]
    return _Draw(rng, ask_named(names, keys, asked), statements, depths, cell.length_tokens)


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
