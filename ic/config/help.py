"""A configuration for a reader: each key of its YAML with one line of meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ic.config.meaning import keys_of
from ic.config.reference import keys_of_suite
from ic.evaluation.registry import suite_names

_LINE = re.compile(r"( *)([\w/-]+):(.*)")
_MEANING_COLUMN = 40
_NARROWEST = 80


def explained(text: str, schema: type, kinds: Mapping[str, type], width: int) -> str:
    """The YAML `text`, each key with its meaning behind `#`, in lines of about `width` characters.

    Args:
        schema: the verb's dataclass.
        kinds: of a part with a class for each option of its group, the one that was chosen.
    """
    meanings = {key.name: key.meaning for key in keys_of(schema)}
    for suite in suite_names():
        meanings |= {key.name: key.meaning for key in keys_of_suite(suite)}
    for part, kind in kinds.items():
        meanings |= {key.name: key.meaning for key in keys_of(kind, f"{part}.")}
    shown: list[str] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:  # an element of a list
            shown.append(line)
            continue
        indent = len(found[1])
        path = [each for each in path if each[0] < indent] + [(indent, found[2])]
        meaning = meanings.get(".".join(name for _, name in path), "")
        shown += _beside(line, meaning, max(width, _NARROWEST))
    return "\n".join(shown)


def _beside(line: str, meaning: str, width: int) -> list[str]:
    if not meaning:
        return [line]
    room = width - _MEANING_COLUMN - 2
    words = _first_phrase(meaning, room)
    if len(line) > _MEANING_COLUMN - 2:
        return [line, f"{'':{_MEANING_COLUMN}}# {words}"]
    return [f"{line:{_MEANING_COLUMN}}# {words}"]


def _first_phrase(meaning: str, room: int) -> str:
    """The meaning up to where its first phrase ends, in `room` characters, else with `...`.

    It is never cut inside brackets or backticks.
    """
    spaces = list(_open_spaces(meaning))
    ends = [place for place in spaces if meaning[place - 1] in ";:."]
    words = meaning[: ends[0]] if ends else meaning
    words = words.rstrip(";:., ")
    if len(words) <= room:
        return words
    before = [place for place in spaces if place <= room - len("...")]
    return f"{words[: before[-1]].rstrip(',;:') if before else ''}..."


def _open_spaces(text: str) -> Iterator[int]:
    """Places of the spaces outside of brackets and backticks."""
    depth, quoted = 0, False
    for place, char in enumerate(text):
        if char == "`":
            quoted = not quoted
        elif not quoted:
            depth += (char in "([{") - (char in ")]}")
            if char == " " and depth == 0:
                yield place
