"""A small essay and questions in the forms of SQuAD and HotpotQA, for the tests of RULER."""

from __future__ import annotations

from typing import Any

_ESSAY = (
    "A lamp stood on the quay. Nobody knew who had lit it! Was it the harbour master, Mr. Hale? "
    "He said nothing. The tide came in twice that night, and each time the lamp burned lower. "
    "In the morning it was gone. Some said that a ship had taken it. Others said that there had "
    "never been a lamp."
)
ESSAY = _ESSAY.split()

SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} {part} lies {where} of the river. It has {count} gates.",
                    "qas": [
                        {
                            "question": f"Where does {title} {part} lie?",
                            "answers": [{"text": where}, {"text": f"{where} of the river"}],
                            "is_impossible": False,
                        },
                        {
                            "question": f"Who built {title} {part}?",
                            "answers": [],
                            "is_impossible": True,
                        },
                    ],
                }
                for part, where, count in (
                    ("Upper Town", "north", 3),
                    ("Lower Town", "south", 5),
                    ("New Town", "east", 2),
                )
            ],
        }
        for title in ("Arlen", "Brun", "Cask", "Dorn")
    ],
}

HOTPOTQA: list[dict[str, Any]] = [
    {
        "question": f"In which town was the maker of the {thing} born?",
        "answer": town,
        "context": [
            [f"The {thing}", [f"The {thing} was made by {maker}.", " It is of oak."]],
            [maker, [f"{maker} was born in {town}."]],
            [f"Other {thing}", [f"Nobody knows who made the other {thing}."]],
        ],
    }
    for thing, maker, town in (
        ("chest", "Ann Ladd", "Reed"),
        ("organ", "Bo Marr", "Sill"),
        ("clock", "Cy Noll", "Tarn"),
    )
]
