"""Codes of many shapes: groups of characters with a sign between them, each shape drawn anew.

With them training sees that a code is copied character by character, whatever it looks like. None
has the shape of a kind of key that is held out.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import numpy as np

from ic.datamodules.facts.kinds import Make, draw_characters, hashed
from ic.datamodules.facts.splits import pick

_DIGITS, _LOWER = "0123456789", "abcdefghijklmnopqrstuvwxyz"
_CLASSES = (_DIGITS, _LOWER.upper(), _LOWER, _DIGITS + "abcdef", _DIGITS + _LOWER + _LOWER.upper())
_JOINERS = ("-", "_", ".", ":", "/", " ", "#", "")
_ENCLOSURES = (*("{}",) * 8, "No. {}", "#{}", "({})", "[{}]")
_LEAST_CHARACTERS, _MOST_IN_GROUP = 4, 5  # with fewer a code may stand in the text by chance
# Characters of one class that follow each other: the class and how many.
_Run = tuple[str, int]

# What a key of each held-out kind looks like, in either case and with any sign between its groups.
_SIGN = r"[-_.:/ #]?"


def _among_groups(pattern: str) -> str:
    """The pattern, alone or with more groups before and behind it."""
    return rf"(?:.*[^a-z0-9])?{pattern}(?:[^a-z0-9].*)?"


HELD_OUT_SHAPES = {
    kind: re.compile(pattern, re.IGNORECASE)
    for kind, pattern in {
        "digits-7": r"\d{7}",
        "digits-10": r"\d{10}",
        "hex-8": r"[0-9a-f]{8}",
        "hex-upper-6": r"[0-9a-f]{6}",
        "letters-6": r"[a-z]{6}",
        "letters-7": r"[a-z]{7}",
        "words-3": r"[a-z]+ [a-z]+ [a-z]+",
        "words-hyphen": r"[a-z]+-[a-z]+",
        "initials": r"[a-z]\. ?[a-z]\. ?[a-z]+",
        "titled-name": r"(dr|prof)\.? [a-z]+",
        "date-ordinal": r"(the )?\d{1,2}(st|nd|rd|th) of [a-z]+,? \d{4}",
        "date-slash": r"\d{1,2}/\d{1,2}/\d{4}",
        "serial": _among_groups(
            rf"[a-z]{{2}}\d{{2}}{_SIGN}[a-z]{{2}}\d{{2}}{_SIGN}[a-z]{{2}}\d{{2}}"
        ),
        "phone": _among_groups(rf"\+?\d{{2}}{_SIGN}\d{{3}}{_SIGN}\d{{4}}"),
    }.items()
}


def held_out_shape(key: str) -> str | None:
    """The held-out kind whose shape a key has, bare or within what encloses it; None if none."""
    inner = key.removeprefix("No. ").strip("#()[]")
    for kind, shape in HELD_OUT_SHAPES.items():
        if shape.fullmatch(key) or shape.fullmatch(inner):
            return kind
    return None


def shaped(groups: int) -> Make:
    """Draws codes of that many groups."""
    return hashed(partial(_draw_code, groups=groups))


def _draw_code(rng: np.random.Generator, groups: int) -> str:
    while True:
        joiner = pick(rng, _JOINERS)
        # As often all groups are alike, as those of a serial number are.
        shapes = [_draw_group(rng)] * groups
        if rng.random() < 0.5:
            shapes = [_draw_group(rng) for _ in range(groups)]
        runs = [run for shape in shapes for run in shape]
        if sum(length for _, length in runs) < _LEAST_CHARACTERS:
            continue
        if not joiner and any(left[-1][0] == right[0][0] for left, right in pairwise(shapes)):
            continue  # one could not see where a group ends
        texts = ["".join(draw_characters(rng, *run) for run in shape) for shape in shapes]
        code = pick(rng, _ENCLOSURES).format(joiner.join(texts))
        if held_out_shape(code) is None:
            return code


def _draw_group(rng: np.random.Generator) -> list[_Run]:
    """One to five characters of one class or, as often, of two."""
    length = int(rng.integers(1, _MOST_IN_GROUP + 1))
    first, second = (_CLASSES[int(index)] for index in rng.permutation(len(_CLASSES))[:2])
    if length == 1 or rng.random() < 0.5:
        return [(first, length)]
    cut = int(rng.integers(1, length))
    return [(first, cut), (second, length - cut)]
