"""Forms that are put together from parts: thousands of ways to write a fact on a line.

With them training sees that signs, brackets and order mean nothing by themselves, and that a value
is found by what stands beside it. They are training's alone: their parts occur in no form that is
held out in the same arrangement (a test draws many and compares).
"""

from __future__ import annotations

import numpy as np

from ic.datamodules.facts.splits import pick

_ORDERS = ("eav", "aev", "ev", "ev", "eva", "vea", "aev")
_ATTRIBUTES = ("{a}", "{a}", "{A}", "{s}", "{c}", "{S}")
_BEGINNINGS = ("", "", "", "- ", "* ", "+ ", "# ", "> ", "@", "$", "set ", "let ", "add ", "put ", "entry ", "record ", "(1) ", "{n}. ", "{n} ", "[{n}] ", "{w}: ", "{w} ")  # fmt: skip # noqa: E501
_SEPARATORS = (": ", " = ", " - ", " -> ", " | ", ", ", "; ", "\t", " / ", " :: ", "=", ":", ":=", "  ", "    ", "\n", "\n  ", "\n- ", " ... ", " (", " & ", "|", " has ", " with ", " at ", "?", " {n} ", " {w} ")  # fmt: skip # noqa: E501
_ENDINGS = ("", "", "", ";", ".", ",", " |", " #", " {n}", " ({w})", "\n---", " ok", "!")
_ENCLOSURES = ("", "", "", "", '""', "''", "()", "[]", "<>", "{}", "**", "__", "$$", "||")


def compose(
    rng: np.random.Generator, *, value_last: bool = False, names_attribute: bool = False
) -> str:
    """A form with places for the entity, the value and, mostly, the attribute.

    Args:
        value_last: nothing but what encloses it comes behind the value, so that it can be asked
            for.
        names_attribute: the attribute has a place.
    """
    orders = [o for o in _ORDERS if not value_last or o.endswith("v")]
    order = pick(rng, [o for o in orders if not names_attribute or "a" in o])
    all_alike = rng.random() < 0.5
    marks = pick(rng, _ENCLOSURES)
    separator = pick(rng, _SEPARATORS)
    text = pick(rng, _BEGINNINGS)
    for nth, place in enumerate(order):
        if not all_alike:
            marks = pick(rng, _ENCLOSURES)
            separator = pick(rng, _SEPARATORS)
        part = pick(rng, _ATTRIBUTES) if place == "a" else f"{{{place}}}"
        half = len(marks) // 2
        text += (separator if nth else "") + marks[:half] + part + marks[half:]
    ending = "" if value_last else pick(rng, _ENDINGS)
    return text + (")" if separator == " (" else "") + ending
