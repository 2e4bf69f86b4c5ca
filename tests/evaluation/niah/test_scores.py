"""What counts as an answer of `suite=niah`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ic.evaluation.niah.scoring import normalise, share_of_values
from ic.evaluation.suite import Sample
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.made_up_books import suite_of

BYTES = ByteTokenizer()


@pytest.mark.parametrize(
    ("text", "value", "right", "at_once"),
    [
        (" 4711.", "4711", True, True),
        (' "4711", he said', "4711", True, True),
        (" 47112", "4711", False, False),
        (" 4711-2", "4711", False, False),
        (" 4711.5", "4711", False, False),
        (" 4711 - and more", "4711", True, True),
        (" it is 4711.", "4711", True, False),
        (" it is 34711, or 3-4711", "4711", False, False),
        (" the answer is W. O. Bianchi.", "W. O. Bianchi", True, False),
        (" the string for Bianchi is UU11-CX32", "UU11-CX32-AB12", False, False),
        ("\nAmber  Falcon Tree.", "amber falcon tree", True, True),
        (" amber falcon", "amber falcon tree", False, False),
        (" $1,234.50.", "$1,234.50", True, True),
        (" DEADBEEF", "deadbeef", True, True),
        (" 7.", "7", True, True),
        ("", "4711", False, False),
    ],
)
@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_a_right_answer_holds_the_value_as_a_whole(
    prompt: str, text: str, value: str, right: bool, at_once: bool
) -> None:
    sample = Sample(np.empty(0, dtype=np.int64), {"values": [value], "other_values": []}, 9)
    score = suite_of(None, prompt=prompt).score(sample, text)
    assert (score.correct, score.measured["at_once"]) == (right, at_once)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" it is 4711. The code of Ben is 22-22.", True),
        (" 22-22. The code of Ann is 4711.", False),
        (" 22-223, or 4711.", True),
        (" the code of Ben is 22-22", False),
    ],
)
def test_a_list_of_what_all_needles_hold_is_not_right(text: str, right: bool) -> None:
    expected = {"values": ["4711"], "other_values": ["9", "22-22"]}
    score = suite_of(None).score(Sample(np.empty(0, dtype=np.int64), expected, 9), text)
    assert score.correct is right
    assert set(score.measured) == {"at_once"}


def test_what_the_distractors_hold_is_kept_for_the_score(books: Path) -> None:
    tokenizer = BYTES
    suite = suite_of(
        books, tasks=["multi_key", "own_words"], lengths=[1024], samples=2, repeat=True
    )
    others = {"multi_key": 4, "own_words": 0}
    for cell in suite.cells():
        sample = suite.sample(tokenizer, cell, 0)
        values = sample.expected["other_values"]
        assert len(set(values) - set(sample.expected["values"])) == others[cell.task]
        assert all(value in tokenizer.decode(sample.ids.tolist()) for value in values)


def test_values_count_one_by_one() -> None:
    values = ["34", "12", "78", "5"]
    assert share_of_values(" 12, 34 and 56.", values) == 0.5
    sample = Sample(np.empty(0, dtype=np.int64), {"values": values, "other_values": []}, 9)
    score = suite_of(None).score(sample, " 12, 34 and 56.")
    assert (score.correct, score.measured["at_once"]) == (0.5, True)
    assert normalise(" “①  ﬁne End!”\n") == "1 fine end"
