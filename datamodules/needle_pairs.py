"""Preference pairs for long-context retrieval: one named key among others, hidden in filler.

A pair asks for one key. The chosen answer gives it; the rejected one gives a distractor's key, a
key that is one digit off, or refuses. Prompts are conversations or text to continue, in TRL's
format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.byte_tokenizer import ByteTokenizer
from ic.datamodules.conversations import check_template, render_ids, text_ids
from ic.datamodules.needles import (
    FILLERS,
    KEY_DIGITS,
    PROMPTS,
    SPLITS,
    answer_keys,
    draw_filler,
    draw_sample,
)
from ic.datamodules.text_files import resolve_files
from ic.files.atomic_write import replacing

REJECTED = ("distractor", "near_miss", "refusal")


@dataclass
class MakePreferencesConfig:
    """The verb `make-preferences`.

    Attributes:
        output: `.jsonl` or `.parquet`.
        lengths: tokens of a pair's longer sequence, prompt and completion.
        depths: needle positions, 0 the beginning and 1 right before the question.
        samples: pairs of each length and depth.
        tokens_per_length: pairs of about so many tokens of each length, many short ones and few
            long ones, instead of `samples`.
        prompt: `chat`, a question in a conversation, or `plain` text that the model continues, as
            pre-training and the passkey evaluation ask.
        num_distractors: other named keys in the text. With none, `plain` hides the one unnamed key
            of the task `single`.
        rejected: how often each kind is the rejected answer; empty for all kinds alike, of which
            `distractor` needs some.
        filler: `noise` sentences or `random` words,
        text_files: or, if given, the user's own text files.
        split: keys of `train`, `validation` or `test`; the passkey evaluation uses the last two.
        tokenizer: `bytes`, or a folder with a Hugging Face tokenizer that has a chat template.
    """

    output: str = "???"
    lengths: list[int] = field(default_factory=lambda: [4096])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 20
    tokens_per_length: int | None = None
    prompt: str = "chat"
    num_distractors: int = 8
    rejected: dict[str, float] = field(default_factory=dict)
    filler: str = "noise"
    text_files: list[str] = field(default_factory=list)
    split: str = "train"
    tokenizer: str = "bytes"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.output.endswith((".jsonl", ".parquet")) and self.output != "???":
            raise ValueError(f"output={self.output!r}: name a .jsonl or .parquet file")
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"lengths={self.lengths}: at least one, each at least 128")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: at least one, each in [0, 1]")
        for name, least in (
            ("samples", 1),
            ("tokens_per_length", 1),
            ("num_distractors", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        for name, allowed in (("filler", FILLERS), ("split", SPLITS), ("prompt", PROMPTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(allowed)}")
        if unknown := sorted(set(self.rejected) - set(REJECTED)):
            raise ValueError(f"rejected: unknown {unknown}; choose from {', '.join(REJECTED)}")
        if not self.rejected:
            self.rejected = dict.fromkeys(REJECTED if self.num_distractors else REJECTED[1:], 1.0)
        if min(self.rejected.values()) < 0 or not sum(self.rejected.values()):
            raise ValueError(f"rejected={self.rejected}: weights >= 0, one above 0")
        if self.rejected.get("distractor") and not self.num_distractors:
            raise ValueError("rejected.distractor: needs num_distractors above 0, or weight 0")

    @property
    def num_pairs(self) -> int:
        return len(self.depths) * sum(self.samples_of(length) for length in self.lengths)

    def samples_of(self, length: int) -> int:
        """Pairs of a length and depth."""
        if self.tokens_per_length is None:
            return self.samples
        return max(1, round(self.tokens_per_length / (length * len(self.depths))))


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
    config: MakePreferencesConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Rows with `prompt`, `chosen`, `rejected` (messages, or text with prompt=plain),
    `rejected_kind`, `length_tokens`, `depth`.

    A row depends on the seed, its length, depth and index alone.

    Raises:
        ValueError: a length that cannot hold the needles, or a tokenizer without chat template.
    """
    if config.prompt == "chat":
        check_template(tokenizer, f"tokenizer={config.tokenizer}", mask=False)
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


def _filler(config: MakePreferencesConfig) -> Filler:
    """A function that draws a number of characters."""
    if not config.text_files:
        return lambda rng, count: draw_filler(rng, config.filler, count).tobytes().decode()
    texts = [
        Path(file).read_text(encoding="utf-8-sig")
        for file in resolve_files(config.text_files, "text_files")
    ]
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
    config: MakePreferencesConfig,
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
        return len(render_ids(tokenizer, [*self.prompt(text), *self.completion(answer)]))


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
