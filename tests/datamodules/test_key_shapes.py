"""Shaped keys have many shapes and none that is held out; held-out kinds have theirs."""

from __future__ import annotations

import re
from datetime import datetime

import numpy as np
import pytest

from ic.datamodules.facts import date_shapes
from ic.datamodules.facts.key_shapes import HELD_OUT_SHAPES, held_out_shape
from ic.datamodules.facts.keys import draw_key, key_kinds

MONTHS = [datetime(2000, month, 1).strftime("%B") for month in range(1, 13)]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SHAPED = ("shaped-2", "shaped-3", "shaped-4", "shaped-5")
# Kinds of training that came with the shaped ones, and an example of each.
NEW = {
    "words-5": r"[a-z]+( [a-z]+){4}",
    "words-8": r"[a-z]+( [a-z]+){7}",
    "middle-initial": r"[A-Z]\w+ [A-Z]\. [A-Z]\w+",
    "last-name-first": r"[A-Z]\w+, [A-Z]\w+",
    "addressed-name": r"(Mrs|Mr|Miss|Sir|Aunt) [A-Z]\w+",
    "double-name": r"[A-Z]\w+ [A-Z]\w+-[A-Z]\w+",
    "couple": r"[A-Z]\w+ & [A-Z]\w+ [A-Z]\w+",
    "date-weekday": r"[A-Z][a-z]+day, \d{1,2} [A-Z][a-z]+ \d{4}",
    "date-day": r"[A-Z][a-z]+ \d{1,2}(st|nd|rd|th)",
    "date-hyphen": r"\d{1,2}-[A-Z][a-z]+-\d{4}",
    "date-year-first": r"\d{4}, \d{1,2} [A-Z][a-z]+",
}


def draw(split: str, kind: str, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [draw_key(rng, split, kind).text for _ in range(count)]


@pytest.mark.parametrize("kind", SHAPED)
def test_no_shaped_key_looks_like_one_that_is_held_out(kind: str) -> None:
    keys = draw("train", kind, 2500)
    assert not [key for key in keys if held_out_shape(key)]
    for shape in HELD_OUT_SHAPES.values():
        assert not [key for key in keys if shape.fullmatch(key.strip("#()[]"))]
    assert all(len(re.findall("[0-9A-Za-z]", key)) >= 4 for key in keys)
    drawn = {re.sub("[a-z]", "a", re.sub("[A-Z]", "A", re.sub("[0-9]", "0", key))) for key in keys}
    assert len(drawn) > 1500
    joined = {"-", "_", ".", ":", "/", " ", "#"}
    assert {sign for key in keys for sign in re.findall(r"\W|_", key)} == joined | set("()[]")
    assert 50 < sum(key.isalnum() for key in keys) < 400  # groups that nothing parts


@pytest.mark.parametrize(("kind", "least_patterns"), [("date-parts", 250), ("date-shaped", 900)])
def test_dates_are_written_in_many_ways_and_none_that_is_held_out(
    kind: str, least_patterns: int
) -> None:
    keys = draw("train", kind, 2000)
    for name in ("date-ordinal", "date-slash"):
        assert not [key for key in keys if HELD_OUT_SHAPES[name].search(key)]
    if kind == "date-parts":
        months = "|".join(month[:3] for month in MONTHS)
        assert all(re.search(months, key, re.IGNORECASE) for key in keys)
    names = "|".join((*MONTHS, *(month[:3] for month in MONTHS), *WEEKDAYS))
    patterns = {re.sub(r"\d+", "0", re.sub(names, "N", key, flags=re.IGNORECASE)) for key in keys}
    assert len(patterns) >= least_patterns
    assert not [key for key in keys if re.search(r"[{}]", key)]
    endings = dict(re.findall(r"(\d+)(st|nd|rd|th)", " ".join(keys)))
    others = {"1": "st", "21": "st", "2": "nd", "22": "nd", "3": "rd", "23": "rd"}
    assert endings == {str(day): others.get(str(day), "th") for day in range(1, 29)}


@pytest.mark.parametrize("kind", NEW)
def test_new_kinds_of_training_have_no_shape_that_is_held_out(kind: str) -> None:
    keys = draw("train", kind, 300)
    assert all(re.fullmatch(NEW[kind], key) for key in keys)
    assert not [key for key in keys if held_out_shape(key)]


def test_held_out_kinds_have_the_shapes_that_are_kept_from_training() -> None:
    held_out = {kind: split for split in ("validation", "test") for kind in key_kinds(split)}
    assert set(HELD_OUT_SHAPES) == set(held_out)
    for kind, split in held_out.items():
        for key in draw(split, kind, 300):
            assert HELD_OUT_SHAPES[kind].fullmatch(key), (kind, key)
            assert held_out_shape(f"No. {key}")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("VE72-WX52-WO92", "serial"),
        ("VE72WX52WO92", "serial"),
        ("ve72/wx52/wo92", "serial"),
        ("#kn51/dy24/yj64/ya29/fv64", "serial"),
        ("AB-12-345-6789", "phone"),
        ("0FE1C7E7", "hex-8"),
        ("[0fe1c7e7]", "hex-8"),
        ("#1234567", "digits-7"),
        ("12-345-6789", "phone"),
        ("Ghijkl", "letters-6"),
        ("No. 21/03/1920", "date-slash"),
        ("VE72-WX52", None),
        ("VE7-WX5-WO9", None),
        ("0fe1-c7e7", None),
    ],
)
def test_the_shape_of_a_key(key: str, kind: str | None) -> None:
    assert held_out_shape(key) == kind


def test_a_weekday_is_that_of_its_date() -> None:
    for key in draw("train", "date-weekday", 50):
        weekday, day, month, year = key.replace(",", "").split()
        number = datetime.strptime(f"{day} {month} {year}", "%d %B %Y").weekday()
        assert WEEKDAYS[number] == weekday


def test_dates_that_are_all_held_out_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a search without an end."""
    monkeypatch.setattr(date_shapes, "_HELD_OUT", (re.compile(""),))
    with pytest.raises(ValueError, match=r"_draw_date.* makes nothing that belongs to split='te"):
        date_shapes.shaped_date(np.random.default_rng(0), "test")
