"""What is asked for: digits, hexadecimal numbers, letters, words, names, dates and more.

Kinds are split, not only the keys of a kind: training never sees a key of seven digits, of eight
hexadecimal ones or of three words.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ic.datamodules.facts.date_shapes import draw_day, shaped_date, shaped_parts, write_day
from ic.datamodules.facts.key_shapes import shaped
from ic.datamodules.facts.kinds import (
    Kind,
    Make,
    characters,
    draw_characters,
    draw_kind,
    hashed,
    named_kind,
    own_kinds,
)
from ic.datamodules.facts.splits import pick
from ic.datamodules.facts.words import (
    draw_first_name,
    draw_full_name,
    draw_last_name,
    draw_pseudo_word,
    draw_town,
    draw_word,
)

_DIGITS = "0123456789"
_HEX = "0123456789abcdef"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MIXED = _DIGITS + _LETTERS + _LETTERS.upper()
_HELD_OUT = {
    "digits-7": "test",
    "digits-10": "validation",
    "hex-8": "test",
    "hex-upper-6": "validation",
    "letters-6": "test",
    "letters-7": "validation",
    "words-3": "test",
    "words-hyphen": "validation",
    "initials": "test",
    "titled-name": "validation",
    "date-ordinal": "test",
    "date-slash": "validation",
    "serial": "test",
    "phone": "validation",
}


@dataclass(frozen=True)
class Key:
    """A value that a fact holds: its text and the name of its kind."""

    text: str
    kind: str


def _of_both(alphabet: str, length: int) -> Make:
    """With a digit and a letter in it: training may see no number of seven digits, and no word of
    six letters.
    """

    def make(rng: np.random.Generator) -> str:
        while (text := draw_characters(rng, alphabet, length)).isdigit() or text.isalpha():
            pass
        return text

    return hashed(make)


def _words(count: int, separator: str = " ") -> Make:
    return lambda rng, split: separator.join(draw_word(rng, split) for _ in range(count))


def _pseudo_words(count: int) -> Make:
    return lambda rng, split: " ".join(draw_pseudo_word(rng, split) for _ in range(count))


def _number(rng: np.random.Generator, least: int, most: int) -> int:
    return int(rng.integers(least, most + 1))


def _date(pattern: str) -> Make:
    return hashed(lambda rng: write_day(pattern, draw_day(rng)))


def _initials(rng: np.random.Generator, split: str) -> str:
    letters = draw_characters(rng, _LETTERS.upper(), 2)
    return f"{letters[0]}. {letters[1]}. {draw_last_name(rng, split)}"


def _titled(rng: np.random.Generator, split: str) -> str:
    return f"{pick(rng, ('Dr.', 'Prof.'))} {draw_last_name(rng, split)}"


def _middle(rng: np.random.Generator, split: str) -> str:
    initial = draw_characters(rng, _LETTERS.upper(), 1)
    return f"{draw_first_name(rng, split)} {initial}. {draw_last_name(rng, split)}"


def _reversed(rng: np.random.Generator, split: str) -> str:
    return f"{draw_last_name(rng, split)}, {draw_first_name(rng, split)}"


def _addressed(rng: np.random.Generator, split: str) -> str:
    return f"{pick(rng, ('Mrs', 'Mr', 'Miss', 'Sir', 'Aunt'))} {draw_last_name(rng, split)}"


def _double(rng: np.random.Generator, split: str) -> str:
    return f"{draw_full_name(rng, split)}-{draw_last_name(rng, split)}"


def _couple(rng: np.random.Generator, split: str) -> str:
    return f"{draw_first_name(rng, split)} & {draw_full_name(rng, split)}"


def _serial(rng: np.random.Generator) -> str:
    groups = [
        draw_characters(rng, _LETTERS.upper(), 2) + draw_characters(rng, _DIGITS, 2)
        for _ in range(3)
    ]
    return "-".join(groups)


def _phone(rng: np.random.Generator) -> str:
    parts = [draw_characters(rng, _DIGITS, length) for length in (2, 3, 4)]
    return f"+{parts[0]} {parts[1]} {parts[2]}"


_OTHERS: dict[str, tuple[str, Make]] = {
    "words-1": ("words", _words(1)),
    "words-2": ("words", _words(2)),
    "words-3": ("words", _words(3)),
    "words-4": ("words", _words(4)),
    **{f"words-{count}": ("words", _words(count)) for count in (5, 6, 7, 8)},
    "words-hyphen": ("words", _words(2, "-")),
    "words-snake": ("words", _words(2, "_")),
    "word-number": ("words", lambda rng, split: f"{draw_word(rng, split)}{_number(rng, 10, 999)}"),
    "pseudo-1": ("pseudo-words", _pseudo_words(1)),
    "pseudo-2": ("pseudo-words", _pseudo_words(2)),
    "pseudo-3": ("pseudo-words", _pseudo_words(3)),
    "first-name": ("names", draw_first_name),
    "full-name": ("names", draw_full_name),
    "town": ("names", draw_town),
    "middle-initial": ("names", _middle),
    "last-name-first": ("names", _reversed),
    "addressed-name": ("names", _addressed),
    "double-name": ("names", _double),
    "couple": ("names", _couple),
    "initials": ("names", _initials),
    "titled-name": ("names", _titled),
    "date-iso": ("dates", _date("{y}-{m:02}-{d:02}")),
    "date-long": ("dates", _date("{d} {b} {y}")),
    "date-us": ("dates", _date("{b} {d}, {y}")),
    "date-dots": ("dates", _date("{d:02}.{m:02}.{y}")),
    "date-month": ("dates", _date("{b} {y}")),
    "date-weekday": ("dates", _date("{w}, {d} {b} {y}")),
    "date-day": ("dates", _date("{b} {d}{th}")),
    "date-hyphen": ("dates", _date("{d}-{b}-{y}")),
    "date-year-first": ("dates", _date("{y}, {d} {b}")),
    "date-parts": ("dates", shaped_parts),
    "date-shaped": ("dates", shaped_date),
    "date-slash": ("dates", _date("{d:02}/{m:02}/{y}")),
    "date-ordinal": ("dates", _date("the {d}{th} of {b}, {y}")),
    "time": ("amounts", hashed(lambda rng: f"{_number(rng, 0, 23):02}:{_number(rng, 0, 59):02}")),
    "price": (
        "amounts",
        hashed(lambda rng: f"${_number(rng, 2, 99_999):,}.{_number(rng, 0, 99):02}"),
    ),
    "decimal": ("amounts", hashed(lambda rng: f"{_number(rng, 0, 999)}.{_number(rng, 10, 999)}")),
    "thousands": ("amounts", hashed(lambda rng: f"{_number(rng, 1_000, 9_999_999):,}")),
    "measure": (
        "amounts",
        hashed(
            lambda rng: (
                f"{_number(rng, 2, 9999)} {pick(rng, ('km', 'kg', 'm', 'litres', 'miles', 'tons'))}"
            )
        ),
    ),
    "version": ("codes", hashed(lambda rng: ".".join(str(_number(rng, 0, 39)) for _ in range(3)))),
    "plate": (
        "codes",
        hashed(
            lambda rng: (
                f"{draw_characters(rng, _LETTERS.upper(), 3)}-{draw_characters(rng, _DIGITS, 3)}"
            )
        ),
    ),
    "grouped": (
        "codes",
        hashed(lambda rng: "-".join(draw_characters(rng, _DIGITS, 4) for _ in range(2))),
    ),
    "serial": ("codes", hashed(_serial)),
    "phone": ("codes", hashed(_phone)),
    **{f"shaped-{groups}": ("codes", shaped(groups)) for groups in (2, 3, 4, 5)},
    "mixed-6": ("codes", _of_both(_MIXED, 6)),
    "mixed-8": ("codes", _of_both(_MIXED, 8)),
    "mixed-12": ("codes", _of_both(_MIXED, 12)),
    "email": (
        "codes",
        lambda rng, split: (
            f"{draw_first_name(rng, split).lower()}@{draw_word(rng, split)}."
            f"{pick(rng, ('org', 'com', 'net'))}"
        ),
    ),
}


def _key_kinds() -> tuple[Kind, ...]:
    makers: dict[str, tuple[str, Make]] = {}
    for length in range(2, 11):
        makers[f"digits-{length}"] = ("digits", characters(_DIGITS, length))
    for length in range(3, 11):
        makers[f"hex-{length}"] = ("hex", _of_both(_HEX, length))
    makers["hex-8"] = ("hex", characters(_HEX, 8))
    makers["hex-upper-6"] = ("hex", characters(_HEX.upper(), 6))
    for length in range(3, 9):
        makers[f"letters-{length}"] = ("letters", characters(_LETTERS, length))
    for length in (3, 4, 5):
        makers[f"capitals-{length}"] = ("letters", characters(_LETTERS.upper(), length))
    makers |= _OTHERS
    return tuple(
        Kind(name, family, _HELD_OUT.get(name, "train"), make)
        for name, (family, make) in makers.items()
    )


KEY_KINDS = _key_kinds()


def key_kinds(split: str) -> tuple[str, ...]:
    """Names of the kinds that a split draws when none is named."""
    return tuple(kind.name for kind in own_kinds(KEY_KINDS, split))


KEY_FAMILIES = tuple(dict.fromkeys(kind.family for kind in KEY_KINDS))


def key_families(split: str) -> tuple[str, ...]:
    """Families of which a split has kinds of its own."""
    return tuple(dict.fromkeys(kind.family for kind in own_kinds(KEY_KINDS, split)))


def draw_key(
    rng: np.random.Generator,
    split: str,
    kind: str | None = None,
    families: Collection[str] = KEY_FAMILIES,
) -> Key:
    """A key of the split, of a kind of its own or of the named one.

    Args:
        families: to one of which the kind belongs, if none is named.

    Raises:
        ValueError: an unknown split, an unknown kind, or one held out for another split.
    """
    if kind is None:
        own = own_kinds(KEY_KINDS, split)
        chosen = draw_kind(rng, tuple(kind for kind in own if kind.family in families))
    else:
        chosen = named_kind(KEY_KINDS, split, kind, "key_kind")
    return Key(chosen.make(rng, split), chosen.name)
