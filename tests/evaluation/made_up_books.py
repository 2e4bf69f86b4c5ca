"""Haystacks for tests: books of made-up sentences whose ends are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ic.evaluation.niah.grid import Config
from ic.evaluation.niah.suite import NiahSuite, build

_LETTERS = list("aeioubdlmnrst")


def write_books(folder: Path, count: int = 3, sentences: int = 150) -> list[str]:
    """Books of made-up sentences, each with its number; one of them in curly quotation marks."""
    folder.mkdir(exist_ok=True)
    books = []
    for number in range(count):
        rng = np.random.default_rng(number)
        made = []
        for index in range(sentences):
            words = " ".join("".join(rng.choice(_LETTERS, 4)) for _ in range(rng.integers(3, 12)))
            end = ("“{}!”", "Mr. {}.", "{}?")[index % 3].format(words.capitalize())
            made.append(end + ("\n\n" if index % 7 == 6 else " "))
        books.append("".join(made).strip())
        (folder / f"{number}.txt").write_text(books[-1])
    return books


def suite_of(books: Path | None, **given: Any) -> NiahSuite:
    chosen: dict[str, Any] = {"lengths": [1024], "samples": 5, "control_samples": 2, **given}
    return build(Config(haystack=None if books is None else str(books), **chosen))
