"""One training sequence of the dense retrieval task (docs/recipe.md, points 2 and 4).

A sequence is cut into slots of 64 bytes. Up to 3/8 of the number of slots are pairs, each taking
two slots: `The pass key for <name> is <key>.` is stated once and again later in the same words, and
the second statement's digits and full stop are answer tokens. One needle task and its question,
in the last slots, make the sequence end like an evaluation prompt. The rest is filler.

Dense pairs are what makes retrieval form quickly: a sequence asks up to 97 questions, not one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ic.datamodules.needle_names import FILLERS
from ic.datamodules.needles import KEY_DIGITS, KEYS, draw_filler, draw_sample
from ic.datamodules.options import SLOT_BYTES

MAX_PAIRS = 96
_PAIR = np.frombuffer(b" The pass key for abc is 00000. ", dtype=np.uint8)
_NAME_AT = _PAIR.tobytes().index(b"abc")
_KEY_AT = _PAIR.tobytes().index(b"00000")


@dataclass(frozen=True)
class Sequence:
    """A row of a batch.

    Attributes:
        tokens: (T,) of integers.
        is_answer: (T,) bool, which of them are answers.
        position_ids: (T,) int64.
        answers: what each answer is about, in the order of the text; empty where nobody asks.
        document_ids: (T,) int32, contiguous runs that do not see each other; None for one.
    """

    tokens: np.ndarray
    is_answer: np.ndarray
    position_ids: np.ndarray
    answers: tuple[dict[str, str], ...] = ()
    document_ids: np.ndarray | None = None


def draw_sequence(
    rng: np.random.Generator,
    length: int,
    *,
    split: str,
    task: str,
    num_needles: int,
    max_position: int,
    skip_probability: float,
    num_skips: int,
) -> Sequence:
    """A sequence of `length` bytes; a task that does not fit in it becomes `single`."""
    slots = length // SLOT_BYTES
    sample = draw_sample(rng, task, split, num_needles)
    ending = (sample.question + sample.answer).encode()
    ending_slots = -(-len(ending) // SLOT_BYTES)
    if task != "single" and slots < ending_slots + 1 + len(sample.others):
        return draw_sequence(
            rng,
            length,
            split=split,
            task="single",
            num_needles=num_needles,
            max_position=max_position,
            skip_probability=skip_probability,
            num_skips=num_skips,
        )
    tokens = draw_filler(rng, FILLERS[int(rng.integers(len(FILLERS)))], length).copy()
    is_answer = np.zeros(length, dtype=bool)

    # Slots are counted from the end, where the question is; bytes left over stay filler in front.
    first = length - slots * SLOT_BYTES
    free = rng.permutation(slots - ending_slots)
    needles = [sample.needle, *sample.others]
    # Values of one name are asked for in the order of the text.
    needle_slots = np.sort(free[: len(needles)]) if task == "multi_value" else free[: len(needles)]
    for text, slot in zip(needles, needle_slots, strict=True):
        _write(rng, tokens, first + int(slot) * SLOT_BYTES, text.encode())
    tokens[length - len(ending) :] = np.frombuffer(ending, dtype=np.uint8)
    # From the first digit to the full stop: a key that goes on after five digits is another key.
    is_answer[length - len(sample.answer) + 1 :] = True

    _write_pairs(rng, tokens, is_answer, free[len(needles) :], slots, first, split)
    positions = draw_positions(rng, length, max_position, skip_probability, num_skips)
    return Sequence(tokens, is_answer, positions)


def draw_positions(
    rng: np.random.Generator,
    length: int,
    max_position: int,
    skip_probability: float,
    num_skips: int,
) -> np.ndarray:
    """Position ids (length,): a random start and `num_skips` skips, all below `max_position`.

    Skipping positions shows the model every rotation up to `max_position` while it computes on
    short sequences (PoSE, arXiv 2309.10400). With probability 1 - skip_probability they are 0, 1,
    2, ...
    """
    positions = np.arange(length)
    room = max_position - length
    if room <= 0 or rng.random() >= skip_probability:
        return positions
    offsets = np.sort(rng.integers(0, room + 1, num_skips + 1))
    edges = np.sort(rng.integers(1, length, num_skips))
    return positions + offsets[np.searchsorted(edges, positions, side="right")]


def _write(rng: np.random.Generator, tokens: np.ndarray, start: int, text: bytes) -> None:
    start += int(rng.integers(SLOT_BYTES - len(text) + 1)) if len(text) < SLOT_BYTES else 0
    tokens[start : start + len(text)] = np.frombuffer(text, dtype=np.uint8)


def _write_pairs(
    rng: np.random.Generator,
    tokens: np.ndarray,
    is_answer: np.ndarray,
    free_slots: np.ndarray,
    slots: int,
    first: int,
    split: str,
) -> None:
    most = min(MAX_PAIRS, slots * 3 // 8, len(free_slots) // 2)
    if most < 1:
        return
    count = int(rng.integers((most + 1) // 2, most + 1))
    pair_slots = np.sort(free_slots[: 2 * count].reshape(2, count), axis=0)
    text = np.tile(_PAIR, (count, 1))
    # Names may repeat by chance (about one sequence in four at 96 pairs); the later statement then
    # wins.
    text[:, _NAME_AT : _NAME_AT + 3] = rng.integers(97, 123, (count, 3), dtype=np.uint8)
    keys = KEYS[split][rng.integers(len(KEYS[split]), size=count)]
    digits = keys[:, None] // 10 ** np.arange(KEY_DIGITS - 1, -1, -1) % 10
    text[:, _KEY_AT : _KEY_AT + KEY_DIGITS] = digits + ord("0")
    for nth in range(2):
        jitter = rng.integers(SLOT_BYTES - len(_PAIR) + 1, size=count)
        starts = first + pair_slots[nth] * SLOT_BYTES + jitter
        tokens[starts[:, None] + np.arange(len(_PAIR))] = text
    is_answer[(starts[:, None] + _KEY_AT + np.arange(KEY_DIGITS + 1)).ravel()] = True
