"""Dates written in many ways, each drawn anew.

A model that has seen few ways to write a date answers in one of them, whatever the text says: with
these training sees that a date is copied as it stands. None is written as one that is held out.
"""

from __future__ import annotations

from datetime import date
from functools import partial

import numpy as np

from ic.datamodules.facts.key_shapes import HELD_OUT_SHAPES
from ic.datamodules.facts.splits import draw_of_split, pick

MONTHS = "January February March April May June July August September October November December"
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_FIRST_YEAR, _LAST_YEAR = 1700, 2099

# Year, month and day, or two of them.
_PARTS = ("md", "dm", "my", "ym")
_WHOLE = ("dmy", "dmy", "mdy", "mdy", "ymd", "ydm", "myd")
_DAYS = ("{d}", "{d}", "{d:02}", "{d}{th}", "{d}{th}", "the {d}{th}")
_MONTHS = ("{b}", "{b}", "{b}", "{short}", "{upper}", "{lower}")
_NUMBERED_MONTHS = ("{m}", "{m:02}")
_YEARS = ("{y}", "{y}", "{y}", "'{yy:02}", "the year {y}", "AD {y}", "({y})")
_JOINERS = (" ", " ", ", ", "-", ".", "/", " / ", "_", ": ", " in ")
_NUMBER_JOINERS = ("-", ".", "/", " ", " - ")
_FRAMES = ("{}", "{}", "{}", "on {}", "dated {}", "{w}, {}", "{w} {}", "{} ({w})")
_HELD_OUT = tuple(HELD_OUT_SHAPES[kind] for kind in ("date-ordinal", "date-slash"))


def draw_day(rng: np.random.Generator) -> date:
    """A day between 1700 and 2099, before the 29th of its month."""
    month, day = int(rng.integers(1, 13)), int(rng.integers(1, 29))
    return date(int(rng.integers(_FIRST_YEAR, _LAST_YEAR + 1)), month, day)


def write_day(pattern: str, day: date) -> str:
    """The pattern with the parts of a day.

    `y` is its year, `yy` that of the century, `m` and `b` its month, `d` and `w` its day; `th` is
    the day's ending, and the name of a month may be `short`, `upper` or `lower`.
    """
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day.day, "th")
    name = MONTHS.split()[day.month - 1]
    return pattern.format(
        y=day.year,
        yy=day.year % 100,
        m=day.month,
        b=name,
        short=name[:3],
        upper=name.upper(),
        lower=name.lower(),
        d=day.day,
        th=ending,
        w=WEEKDAYS.split()[day.weekday()],
    )


def shaped_date(rng: np.random.Generator, split: str) -> str:
    """A date of year, month and day, which belongs to the split whatever stands around it."""
    return _shaped(rng, split, _WHOLE, in_numbers=rng.random() < 0.25)


def shaped_parts(rng: np.random.Generator, split: str) -> str:
    """A day of a month, or a month of a year; the month by its name, so that one sees which."""
    return _shaped(rng, split, _PARTS, in_numbers=False)


def _shaped(
    rng: np.random.Generator, split: str, orders: tuple[str, ...], *, in_numbers: bool
) -> str:
    make = partial(_draw_date, orders=orders, in_numbers=in_numbers)
    text, _ = draw_of_split(rng, split, make, _bare_date)
    return text


def _draw_date(
    rng: np.random.Generator, orders: tuple[str, ...], in_numbers: bool
) -> tuple[str, str]:
    """A date, and the same without what stands around it."""
    order = pick(rng, orders)
    frame = pick(rng, _FRAMES) if "d" in order else "{}"
    pattern, day = _draw_pattern(rng, order, in_numbers), draw_day(rng)
    return write_day(frame.replace("{}", pattern), day), write_day(pattern, day)


def _bare_date(drawn: tuple[str, str]) -> str | None:
    """What decides the split of a date; None if it is written as one that is held out."""
    text, bare = drawn
    return None if any(shape.search(text) for shape in _HELD_OUT) else bare


def _draw_pattern(rng: np.random.Generator, order: str, in_numbers: bool) -> str:
    forms = {
        "d": ("{d}", "{d:02}") if in_numbers else _DAYS,
        "m": _NUMBERED_MONTHS if in_numbers else _MONTHS,
        "y": ("{y}",) if in_numbers else _YEARS,
    }
    joiner = pick(rng, _NUMBER_JOINERS if in_numbers else _JOINERS)
    last = joiner if in_numbers or rng.random() < 0.6 else pick(rng, (" ", ", "))
    first, *others = (pick(rng, forms[part]) for part in order)
    text = first
    for nth, part in enumerate(others):
        text += (last if nth == len(others) - 1 else joiner) + part
    return text
