"""Who or what a fact is about: people, places, rooms, ships, files and more."""

from __future__ import annotations

import re

import numpy as np

from ic.datamodules.facts.kinds import (
    Kind,
    draw_characters,
    draw_kind,
    hashed,
    named_kind,
    open_kinds,
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

_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHOICES = {
    "role": """gardener driver pilot baker nurse lawyer clerk farmer painter singer tailor teacher
        builder sailor cook guard miner printer dentist plumber banker barber potter weaver""",
    "place": "room locker desk box shelf cabin track bay hall unit",
    "thing": "item crate order parcel",
    "form": "Ltd Works Brothers Press",
    "suffix": "txt csv log pdf dat",
}
# What a part of a pattern stands for; words and names are of the split.
_PARTS = {
    "first": draw_first_name,
    "last": draw_last_name,
    "full": draw_full_name,
    "pseudo": draw_pseudo_word,
    "Pseudo": lambda rng, split: draw_pseudo_word(rng, split).capitalize(),
    "word": draw_word,
    "Word": lambda rng, split: draw_word(rng, split).capitalize(),
    "town": draw_town,
}
# Name, family, split and pattern of each kind.
_PATTERNS = (
    ("first-name", "people", "train", "{first}"),
    ("full-name", "people", "train", "{full}"),
    ("role", "people", "train", "the {role} {first}"),
    ("doctor", "people", "validation", "Doctor {last}"),
    ("captain", "people", "test", "Captain {last}"),
    ("letters-3", "letters", "train", "{l}{l}{l}"),
    ("letters-5", "letters", "train", "{l}{l}{l}{l}{l}"),
    ("pseudo-word", "pseudo-words", "train", "{pseudo}"),
    ("pseudo-name", "pseudo-words", "train", "{Pseudo}"),
    ("pseudo-number", "pseudo-words", "train", "{pseudo}-{n}"),
    ("word", "words", "train", "{word}"),
    ("words-2", "words", "train", "{word} {word}"),
    ("words-hyphen", "words", "train", "{word}-{word}"),
    ("town", "places", "train", "{town}"),
    ("street", "places", "train", "{n} {Word} Street"),
    ("lake", "places", "validation", "Lake {Pseudo}"),
    ("river", "places", "test", "the river {Pseudo}"),
    ("numbered", "things", "train", "{place} {n}"),
    ("item", "things", "train", "{thing} {L}-{n}"),
    ("file", "things", "train", "{word}_{n}.{suffix}"),
    ("flight", "things", "validation", "flight {L}{L}{n}"),
    ("gate", "things", "test", "gate {L}{n}"),
    ("project", "undertakings", "train", "Project {Word}"),
    ("ship", "undertakings", "train", "the {Word} {last}"),
    ("company", "undertakings", "train", "{last} {form}"),
    ("partners", "undertakings", "test", "{last} & {last}"),
)


def _part(rng: np.random.Generator, split: str, name: str) -> str:
    if name in _PARTS:
        return _PARTS[name](rng, split)
    if name in _CHOICES:
        return pick(rng, _CHOICES[name].split())
    if name == "n":
        return str(int(rng.integers(2, 1000)))
    letter = draw_characters(rng, _CAPITALS, 1)
    return letter if name == "L" else letter.lower()


def _kind(name: str, family: str, split: str, pattern: str) -> Kind:
    def make(rng: np.random.Generator, split: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: _part(rng, split, match.group(1)), pattern)

    if any(f"{{{part}}}" in pattern for part in _PARTS):
        return Kind(name, family, split, make)
    # Nothing in it is of a split, so the whole has to be.
    return Kind(name, family, split, hashed(lambda rng: make(rng, "train")))


ENTITY_KINDS = tuple(_kind(*pattern) for pattern in _PATTERNS)


def entity_kinds(split: str) -> tuple[str, ...]:
    """Names of the kinds that a split draws: its own, and training's with names of its own."""
    return tuple(kind.name for kind in open_kinds(ENTITY_KINDS, split))


def draw_entity(rng: np.random.Generator, split: str, kind: str | None = None) -> tuple[str, str]:
    """An entity of the split and the name of its kind, of any kind open to it or the named one.

    Raises:
        ValueError: an unknown split, an unknown kind, or one held out for another split.
    """
    if kind is None:
        chosen = draw_kind(rng, open_kinds(ENTITY_KINDS, split))
    else:
        chosen = named_kind(ENTITY_KINDS, split, kind, "entity_kind")
    return chosen.make(rng, split), chosen.name
