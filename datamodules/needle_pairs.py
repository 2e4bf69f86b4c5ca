"""Preference pairs for long-context retrieval: one named key among others, hidden in filler.

A pair asks for one key. The chosen answer gives it; the rejected one gives a distractor's key, a
key that is one digit off, or refuses. Prompts are conversations or text to continue, in TRL's
format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.conversations import apply_template, check_template, text_ids
from ic.datamodules.needle_names import SPLITS
from ic.datamodules.needle_pairs_options import REJECTED, MakePreferencesOptions
from ic.datamodules.needles import KEY_DIGITS, answer_keys, draw_filler, draw_sample
from ic.datamodules.text_files import read_text, resolve_files
from ic.files.atomic_write import replacing
from ic.model.byte_tokenizer import ByteTokenizer


def question_of(name: str) -> str:
    """The question that ends a user's turn.

    It holds the answer's beginning, as RULER's prompts do (arXiv 2404.06654): a model of this
    project's size that was trained on needles alone does not copy a name (docs/log.md).
    """
    return f" What is the pass key for {name}? Complete the sentence: The pass key for {name} is"


def answer_of(key: str | None) -> str:
    """The end of that sentence, right or wrong; None where no key is said to be there."""
    return "not in the text." if key is None else f"{key}."


def needle_pairs(
    config: MakePreferencesOptions, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Rows with `prompt`, `chosen`, `rejected` (messages, or text with prompt=plain),
    `rejected_kind`, `length_tokens`, `depth`.

    A row depends on the seed, its length, depth and index alone.

    Raises:
        ValueError: a length that cannot hold the needles, or a tokenizer without chat template.
    """
    if config.prompt == "chat":
        check_template(tokenizer, f"tokenizer={config.tokenizer}")
    filler = _filler(config)
    kinds = [kind for kind in REJECTED if config.rejected.get(kind, 0) > 0]
    weights = np.array([config.rejected[kind] for kind in kinds])
    for length in config.lengths:
        for depth in config.depths:
            for index in range(config.samples_of(length)):
                rng = np.random.default_rng(
                    [config.seed, SPLITS.index(config.split), length, round(1e6 * depth), index]
                )
                kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
                yield _pair(rng, config, tokenizer, filler, length, depth, kind)


def write_pairs(rows: Iterator[dict[str, Any]], output: Path) -> int:
    """Write rows as JSON Lines or parquet under a temporary name -> their number."""
    count = 0
    with replacing(output) as partial:
        if output.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            listed = list(rows)
            count = len(listed)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(listed), partial)
        else:
            with partial.open("w") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
    return count


Filler = Callable[[np.random.Generator, int], str]


def _filler(config: MakePreferencesOptions) -> Filler:
    """A function that draws a number of characters."""
    if not config.text_files:
        return lambda rng, count: draw_filler(rng, config.filler, count).tobytes().decode()
    texts = [read_text(file) for file in resolve_files(config.text_files, "text_files")]
    corpus = " ".join(" ".join(texts).split())
    if not corpus:
        raise ValueError(f"text_files={config.text_files}: no text in them")

    def own_text(rng: np.random.Generator, count: int) -> str:
        start = int(rng.integers(len(corpus)))
        around = corpus[start:] + " " + corpus * (count // len(corpus) + 1)
        return around[:count]

    return own_text


def _pair(
    rng: np.random.Generator,
    config: MakePreferencesOptions,
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    depth: float,
    kind: str,
) -> dict[str, Any]:
    is_chat = config.prompt == "chat"
    task = "multi_key" if is_chat or config.num_distractors else "single"
    sample = draw_sample(rng, task, config.split, config.num_distractors)
    form = _Chat(question_of(sample.name)) if is_chat else _Plain(sample.question)
    needles = [sample.needle, *sample.others]
    keys = [answer_keys(needle)[0] for needle in needles]
    wrong = None
    if kind == "distractor":
        wrong = keys[1 + int(rng.integers(config.num_distractors))]
    elif kind == "near_miss":
        wrong = _near_miss(rng, keys)
    chosen, rejected = form.answer(keys[0]), form.answer(wrong)
    longer = max(chosen, rejected, key=len)
    room = length - form.num_tokens(tokenizer, "".join(needles), longer)
    if room < 0:
        raise ValueError(
            f"lengths: {length} tokens cannot hold {config.num_distractors + 1} keys and the "
            f"question, which take {length - room}"
        )
    text = _cut(tokenizer, filler(rng, room * _MOST_CHARACTERS), room)
    places = [round(depth * len(text)), *rng.integers(0, len(text) + 1, config.num_distractors)]
    while True:
        whole = _insert(text, needles, [int(p) for p in places])
        over = 0
        if not isinstance(tokenizer, ByteTokenizer):  # bytes add up; other tokens may merge
            over = form.num_tokens(tokenizer, whole, longer) - length
        if over <= 0:
            break
        text = _cut(tokenizer, text, len(text_ids(tokenizer, text)) - over)
        places = [min(place, len(text)) for place in places]
    return {
        "prompt": form.prompt(whole),
        "chosen": form.completion(chosen),
        "rejected": form.completion(rejected),
        "rejected_kind": kind,
        "length_tokens": length,
        "depth": depth,
    }


@dataclass(frozen=True)
class _Chat:
    """A named key, asked for and answered in a conversation."""

    question: str

    def prompt(self, text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text + self.question}]

    def answer(self, key: str | None) -> str:
        return answer_of(key)

    def completion(self, answer: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": answer}]

    def num_tokens(self, tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> int:
        messages = [*self.prompt(text), *self.completion(answer)]
        return len(apply_template(tokenizer, messages, "a needle conversation")[0])


@dataclass(frozen=True)
class _Plain:
    """Text that ends in a question and the beginning of its answer."""

    question: str

    def prompt(self, text: str) -> str:
        return text + self.question

    def answer(self, key: str | None) -> str:
        return f" {answer_of(key)}"

    def completion(self, answer: str) -> str:
        return answer

    def num_tokens(self, tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> int:
        return len(text_ids(tokenizer, f"{self.prompt(text)}{answer}{tokenizer.eos_token}"))


# A token is rarely longer; a filler that falls short of the room makes a shorter pair.
_MOST_CHARACTERS = 8


def _near_miss(rng: np.random.Generator, keys: list[str]) -> str:
    """The first key with one digit changed, and none of the others."""
    while True:
        at = int(rng.integers(KEY_DIGITS))
        digit = (int(keys[0][at]) + int(rng.integers(1, 10))) % 10
        near = keys[0][:at] + str(digit) + keys[0][at + 1 :]
        if near not in keys:
            return near


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The beginning of a text, of at most so many tokens."""
    if isinstance(tokenizer, ByteTokenizer):
        return text.encode()[:tokens].decode(errors="ignore")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[: max(0, tokens)]))


def _insert(text: str, pieces: list[str], places: list[int]) -> str:
    out, last = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda item: item[0]):
        out += [text[last:place], piece]
        last = place
    return "".join([*out, text[last:]])
