"""Sentence ends, by hand."""

from __future__ import annotations

import pytest

from ic.datamodules.sentences import sentence_ends, split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  \n ", []),
        ("One only", ["One only"]),
        ("It rains. We stay. Why?", ["It rains.", "We stay.", "Why?"]),
        ('"Go!" he said. She went.', ['"Go!" he said.', "She went."]),
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("Mr. Hyde met Dr. J. Lanyon. He fled.", ["Mr. Hyde met Dr. J. Lanyon.", "He fled."]),
        ("It was I. Nobody else.", ["It was I.", "Nobody else."]),
        ("In 1871. 40 men came... and went.", ["In 1871.", "40 men came... and went."]),
        ("A title\n\nThe text\ngoes on. End", ["A title", "The text\ngoes on.", "End"]),
        ("Über alles. Äpfel sind rot.", ["Über alles.", "Äpfel sind rot."]),
        ("3.5 metres. e.g. this", ["3.5 metres. e.g. this"]),
    ],
)
def test_split(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_ends_lie_right_behind_the_sentences() -> None:
    text = '"Go!"  he said. "Now."\n\nShe went'
    ends = list(sentence_ends(text))
    assert [(text[:end], text[start:]) for end, start in ends] == [
        ('"Go!"  he said.', '"Now."\n\nShe went'),
        ('"Go!"  he said. "Now."', "She went"),
    ]


def test_nothing_is_lost() -> None:
    text = "The sea was calm. \n\n \"Look!\" cried Mrs. Vane; 'a sail!' It was so (or nearly). Well"
    assert "".join(split_sentences(text)).replace(" ", "") == "".join(text.split())
