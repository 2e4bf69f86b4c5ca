"""Needles, questions and filler of the synthetic retrieval tasks; shared by training and
evaluation.

Keys are five zero-padded digits. A fixed hash splits all of them once, so that no key asked for in
validation or test occurs in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ic.datamodules.needle_names import FILLERS, TASKS

KEY_DIGITS = 5
NAME_LETTERS = 3

# The filler of Mohtashami and Jaggi (arXiv 2305.16300), which most passkey reports use.
NOISE = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


def _split_of_keys() -> dict[str, np.ndarray]:
    keys = np.arange(10**KEY_DIGITS)
    # A multiplicative hash, not the last digit: training has to see every digit in every place.
    bucket = (keys * 48271 % 65537) % 10
    return {"train": keys[bucket >= 2], "validation": keys[bucket == 0], "test": keys[bucket == 1]}


KEYS = _split_of_keys()


@dataclass(frozen=True)
class NeedleSample:
    """Statements to hide, the question, and its answer.

    Attributes:
        needle: the statement that the answer needs and whose depth is reported.
        others: further statements: distractors, or the other values or keys asked for.
        question: ends right before the answer.
        answer: expected continuation, a space and digits, several separated by commas.
    """

    needle: str
    others: tuple[str, ...]
    question: str
    answer: str

    @property
    def keys(self) -> list[str]:
        """The digits asked for, in order."""
        return answer_keys(self.answer)

    @property
    def name(self) -> str:
        """Whose key is asked for; of a named key."""
        return re.findall(r"for (\w+) is", self.needle)[0]


def answer_keys(text: str) -> list[str]:
    """Every run of exactly five digits in a text, in order."""
    return re.findall(rf"(?<!\d)\d{{{KEY_DIGITS}}}(?!\d)", text)


def draw_keys(rng: np.random.Generator, count: int, split: str) -> list[str]:
    """Distinct keys of a split, zero-padded."""
    keys: list[int] = []
    while len(keys) < count:
        key = int(KEYS[split][rng.integers(len(KEYS[split]))])
        if key not in keys:
            keys.append(key)
    return [f"{key:0{KEY_DIGITS}d}" for key in keys]


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct names of three lower-case letters."""
    names: list[str] = []
    while len(names) < count:
        name = rng.integers(97, 123, NAME_LETTERS, dtype=np.uint8).tobytes().decode()
        if name not in names:
            names.append(name)
    return names


def draw_sample(
    rng: np.random.Generator, task: str, split: str, num_needles: int = 4
) -> NeedleSample:
    """One sample of a task.

    Args:
        task: `single`: one plain pass key. `multi_key`: one named key among `num_needles` with
            other names. `multi_value`: `num_needles` values of one name, all asked for in the order
            of the text. `multi_query`: `num_needles` named keys, all asked for.
        num_needles: distractors of `multi_key`; values or queries of the others.

    Raises:
        ValueError: an unknown task.
    """
    if task == "single":
        (key,) = draw_keys(rng, 1, split)
        needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
        return NeedleSample(needle, (), " What is the pass key? The pass key is", f" {key}.")
    if task == "multi_key":
        keys = draw_keys(rng, num_needles + 1, split)
        names = draw_names(rng, num_needles + 1)
        return ask_named(names, keys, 0)
    if task == "multi_value":
        keys, (name,) = draw_keys(rng, num_needles, split), draw_names(rng, 1)
        lines = [named_needle(name, k) for k in keys]
        question = f" What are all the pass keys for {name}? The pass keys for {name} are"
        return NeedleSample(lines[0], tuple(lines[1:]), question, f" {', '.join(keys)}.")
    if task == "multi_query":
        keys, names = draw_keys(rng, num_needles, split), draw_names(rng, num_needles)
        lines = [named_needle(n, k) for n, k in zip(names, keys, strict=True)]
        question = f" What are the pass keys for {', '.join(names)}? They are"
        return NeedleSample(lines[0], tuple(lines[1:]), question, f" {', '.join(keys)}.")
    raise ValueError(f"task={task!r}: choose one of {', '.join(TASKS)}")


def ask_named(names: Sequence[str], keys: Sequence[str], asked: int) -> NeedleSample:
    """The question for one of several named keys; the others are distractors."""
    lines = [named_needle(n, k) for n, k in zip(names, keys, strict=True)]
    needle, name = lines.pop(asked), names[asked]
    question = f" What is the pass key for {name}? The pass key for {name} is"
    return NeedleSample(needle, tuple(lines), question, f" {keys[asked]}.")


def named_needle(name: str, key: str) -> str:
    """The statement of a named key."""
    return f" The pass key for {name} is {key}. "


def draw_filler(rng: np.random.Generator, kind: str, num_bytes: int) -> np.ndarray:
    """Filler text as bytes (num_bytes,) uint8: `noise` sentences from a random phase, or `random`
    words.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "noise":
        noise = np.frombuffer(NOISE, dtype=np.uint8)
        return np.resize(np.roll(noise, -int(rng.integers(len(noise)))), num_bytes)
    if kind == "random":
        letters = rng.integers(97, 123, num_bytes, dtype=np.uint8)
        letters[rng.random(num_bytes) < 0.18] = ord(" ")
        return letters
    raise ValueError(f"filler={kind!r}: choose one of {', '.join(FILLERS)}")
