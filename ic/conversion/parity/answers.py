"""Short instructions, asked in the model's own chat template and answered by both models."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ic.conversion.parity.distributions import token_distances
from ic.conversion.parity.instructions import Instruction, prompt_of, shipped_instructions
from ic.conversion.parity.options import ParityConfig
from ic.conversion.parity.pair import Pair
from ic.datamodules.tokenizers import tokenizer_fingerprint
from ic.evaluation.statistics import Accuracy, mean_columns
from ic.files.json_lines import append_row, read_rows
from ic.files.run_folder import ParityFolder
from ic.inference.greedy import GreedyDecoder
from ic.inference.model_facts import end_tokens

Row = dict[str, Any]
# Instructions that a model answers at once; what was answered is kept after as many.
TOGETHER = 16


def answer_instructions(
    config: ParityConfig,
    pair: Pair,
    folder: ParityFolder,
    on_answers: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """A row for each instruction, in their order; those in the folder are not asked again.

    `original` and `converted` are greedy answers. `agreement` and `kl` are of the tokens of the
    original's answer, its end included: whether the converted model would go on with the same
    token, and KL(original || converted) in nats. `similarity` is difflib's ratio of the answers'
    words: 1 where they are equal.
    """
    known = answered(config, pair, folder)
    asked = shipped_instructions()[: config.instructions]
    decoders = {
        name: GreedyDecoder(
            side.model, config.prefill_chunk_tokens, ends=end_tokens(side.model, pair.tokenizer)
        )
        for name, side in pair.sides.items()
    }
    prompts = {each: prompt_of(pair.tokenizer, each.instruction) for each in asked}
    # By length: those that are asked together are padded to the longest of them.
    left = sorted(
        (each for each in asked if each.instruction not in known),
        key=lambda each: len(prompts[each]),
    )
    for start in range(0, len(left), TOGETHER):
        some = left[start : start + TOGETHER]
        answers = {
            name: answers_to(decoder, [prompts[each] for each in some], config.answer_tokens)
            for name, decoder in decoders.items()
        }
        for place, each in enumerate(some):
            of_each = {name: given[place] for name, given in answers.items()}
            row = _row(config, pair, each, prompts[each], of_each)
            known[each.instruction] = row
            append_row(folder.answers, {**row, "asked_of": _identity(config, pair)})
            on_answers(1)
    return [known[each.instruction] for each in asked]


def answered(config: ParityConfig, pair: Pair, folder: ParityFolder) -> dict[str, Row]:
    """The rows that the folder holds of these two models, by their instructions."""
    identity = _identity(config, pair)
    rows = [row for row in read_rows(folder.answers) if row.pop("asked_of") == identity]
    return {row["instruction"]: row for row in rows}


def answer_row(answers: Sequence[Row]) -> Row:
    """What all answers say together; an instruction is the unit of every interval."""
    first = Accuracy(sum(row["same_first"] for row in answers), len(answers))
    whole = Accuracy(sum(row["same_answer"] for row in answers), len(answers))
    return {
        "what": "instructions",
        "n": len(answers),
        "n_tokens": sum(row["tokens_original"] for row in answers),
        **{f"same_first_{name}": value for name, value in _share(first).items()},
        **{f"same_answer_{name}": value for name, value in _share(whole).items()},
        **mean_columns("agreement", [row["agreement"] for row in answers], most=1.0),
        **mean_columns("kl", [row["kl"] for row in answers]),
        **mean_columns("similarity", [row["similarity"] for row in answers], most=1.0),
    }


def answers_page(answers: Sequence[Row], original: str, converted: str) -> str:
    """Both answers to each instruction, to be read."""
    lines = [f"# Answers of {original} (original) and {converted} (converted)", ""]
    lines += ["Greedy, in the chat template; an answer that goes on was cut off."]
    for number, row in enumerate(answers, 1):
        lines += ["", f"## {number}. {row['kind']}", "", *_quoted(row["instruction"]), ""]
        same = ", the same" if row["same_answer"] else f", similarity {row['similarity']:.2f}"
        lines += ["**original**", "", *_quoted(row["original"]), ""]
        lines += [f"**converted**{same}", "", *_quoted(row["converted"])]
    return "\n".join(lines) + "\n"


def answers_to(
    decoder: GreedyDecoder, prompts: Sequence[np.ndarray], new_tokens: int
) -> list[list[int]]:
    """The tokens of each answer, with the one that ends it."""
    given = decoder.answers_of_any_length([torch.from_numpy(each) for each in prompts], new_tokens)
    answers = [each.tolist() for each in given]
    end = decoder.ends[0] if decoder.ends else None
    return [each[: each.index(end) + 1] if end in each else each for each in answers]


def _row(
    config: ParityConfig,
    pair: Pair,
    asked: Instruction,
    prompt_T: np.ndarray,
    answers: dict[str, list[int]],
) -> Row:
    distances = token_distances(
        pair.original.model,
        pair.converted.model,
        np.concatenate([prompt_T, np.asarray(answers["original"], dtype=np.int64)]),
        pair.vocabulary,
        both_tokens=pair.both_positions,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
    )
    behind = slice(len(prompt_T) - 1, None)
    texts = {
        name: str(pair.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        for name, tokens in answers.items()
    }
    return {
        "kind": asked.kind,
        "instruction": asked.instruction,
        **texts,
        "tokens_original": len(answers["original"]),
        "tokens_converted": len(answers["converted"]),
        "same_first": answers["original"][0] == answers["converted"][0],
        "same_answer": answers["original"] == answers["converted"],
        "agreement": float(distances.agrees[behind].mean()),
        "kl": float(distances.kl[behind].mean(dtype=np.float64)),
        "similarity": similarity(texts["original"], texts["converted"]),
    }


def _identity(config: ParityConfig, pair: Pair) -> str:
    """Of all that an answer depends on, but for the instruction."""
    sides = [
        (side.weights, str(side.model.dtype), end_tokens(side.model, pair.tokenizer))
        for side in pair.sides.values()
    ]
    tokenizer = tokenizer_fingerprint(pair.tokenizer), str(pair.tokenizer.chat_template)
    return hashlib.sha256(repr((sides, tokenizer, config.answer_tokens)).encode()).hexdigest()[:16]


def similarity(first: str, second: str) -> float:
    """Share of two texts' words that are common and in the same order, of 0 to 1."""
    return difflib.SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()


def _share(accuracy: Accuracy) -> dict[str, float]:
    low, high = accuracy.interval
    return {"share": accuracy.share, "low_95": low, "high_95": high}


def _quoted(text: str) -> list[str]:
    return [f"> {line}" if line else ">" for line in text.splitlines()] or ["> (nothing)"]
