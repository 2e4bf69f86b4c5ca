"""Prompts of needles in text: filler of an exact length, needles at sentence ends, the question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.evaluation.framing import Frame, encode, frame_prompt
from ic.evaluation.niah.grid import Cell, Config
from ic.evaluation.niah.haystack import Haystack
from ic.evaluation.niah.needles import Needles, draw_needles, kinds_of_keys
from ic.evaluation.options import CONTROL
from ic.evaluation.suite import Sample

# What a model may write before the value: quotation marks, "it is", or the question's words again.
SPARE_TOKENS = 24


@dataclass(frozen=True)
class Parts:
    """What of a prompt is not filler.

    Attributes:
        rng: what draws the rest.
        kind: of the keys.
        pieces: token ids (n,) int64 of each statement that is hidden.
        depths: of each, None for anywhere.
        num_tokens: that all of it takes, with the tokens to generate.
    """

    rng: np.random.Generator
    kind: str
    needles: Needles
    pieces: list[np.ndarray]
    depths: list[float | None]
    frame: Frame
    new_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.new_tokens + len(self.frame) + sum(map(len, self.pieces))


def parts_of(tokenizer: PreTrainedTokenizerBase, options: Config, cell: Cell, index: int) -> Parts:
    """What sample `index` of a cell hides and asks for, in tokens.

    Raises:
        ValueError: it does not fit in the length, or the tokenizer has no chat template.
    """
    kind = options.kind_of(kinds_of_keys(options), cell, index)
    depth = round(1e6 * (1 + cell.depth))
    rng = np.random.default_rng(
        [options.seed, cell.length_tokens, depth, index, *f"{cell.task} {kind}".encode()]
    )
    needles = draw_needles(rng, options, cell.task, kind)
    hidden = [needles.needle, *needles.others]
    depths: list[float | None] = [cell.depth, *[None] * len(needles.others)]
    if cell.depth == CONTROL:
        # The other values would be right answers, so they go too.
        kept = 0 if len(needles.values) > 1 else len(needles.others)
        hidden, depths = list(needles.others[:kept]), [None] * kept
    parts = Parts(
        rng,
        kind,
        needles,
        [encode(tokenizer, needle.inserted) for needle in hidden],
        depths,
        frame_prompt(tokenizer, options.prompt, f"\n\n{needles.question}"),
        len(encode(tokenizer, needles.answer)) + SPARE_TOKENS,
    )
    if parts.num_tokens >= cell.length_tokens:
        raise ValueError(
            f"suite.niah.lengths: {cell.length_tokens} tokens cannot hold the task {cell.task} "
            f"with keys of {kind} and num_needles={options.num_needles}: question, needles "
            f"and answer take {parts.num_tokens}, and text goes between them"
        )
    return parts


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, options: Config, haystack: Haystack, cell: Cell, index: int
) -> Sample:
    """Sample `index` of a cell: with what is generated exactly `cell.length_tokens` tokens.

    It depends on the seed, the forms, the haystack and its own cell and index alone.

    `expected` holds the values, those of distractors, the kind of key, the needle and the question.

    Raises:
        ValueError: it does not fit in the length, or the text is too short.
    """
    parts = parts_of(tokenizer, options, cell, index)
    filler = haystack.cut(parts.rng, tokenizer, cell.length_tokens - parts.num_tokens)
    anywhere = parts.rng.random(len(parts.depths)).tolist()
    places = [
        filler.place(drawn if depth is None else depth)
        for depth, drawn in zip(parts.depths, anywhere, strict=True)
    ]
    ids, last = [parts.frame.before], 0
    for place, number in sorted(zip(places, range(len(places)), strict=True)):
        ids += [filler.ids_T[last:place], parts.pieces[number]]
        last = place
    ids += [filler.ids_T[last:], parts.frame.after]
    needles = parts.needles
    expected = {
        "values": list(needles.values),
        "other_values": list(needles.other_values),
        "kind": parts.kind,
        "needle": needles.needle.text,
        "question": needles.question,
    }
    return Sample(np.concatenate(ids), expected, parts.new_tokens)
