"""The published prompts and score format, against what the package's own parser finds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ic.evaluation.judge.prometheus import (
    _published,
    absolute_messages,
    parse_score,
    parse_verdict,
    relative_messages,
    rubric_text,
)

# What the package's parser finds in each text (0.1.20, its last release) stands in the file, with the
# parser's commit. We differ in these, and in no other:
STRICTER = {  # without the published mark, or with two that contradict each other
    "It falls short of the Reference Answer (Score 5)",
    "This is not worth a score of 4",
    "I would not give Score: 5",
    "Good job. Score: 3",
    "Good job. [Score 4]",
    "[SCORE] 4",
    "[RESULT] 5 would be too much, so [RESULT] 3",
    "[RESULT] A. No, [RESULT] B",
    "Both responses are similar... [Response B]",
    "Result: B",
}
END_OF_ANSWER = {  # theirs also reads ends of lines in between
    "Let me look at [Response A]\nand at the other, which is better. [RESULT] B": "B",
    "Result: A\nis what some would say. [RESULT] B": "B",
}
PUNCTUATED = {  # a full stop, brackets or Markdown around what stands behind the mark
    "Good. **[RESULT]** 4": 4,
    "Good. [RESULT] **4**": 4,
    "Good. [RESULT] 4.": 4,
    "Good. [RESULT] (A)": "A",
    'Good. [RESULT] "A"': "A",
    "Good. [RESULT] **B**": "B",
    "Good. [RESULT] B.": "B",
}
CASES = json.loads(Path(__file__).with_name("package_parser.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][-40:] or "empty")
def test_scores_are_the_package_s_or_stricter(case: dict) -> None:
    text = case["text"]
    expected = {**END_OF_ANSWER, **PUNCTUATED}.get(
        text, None if text in STRICTER else case["theirs"]
    )
    parse = parse_score if case["mode"] == "absolute" else parse_verdict
    assert parse(text) == expected


def test_every_difference_is_one() -> None:
    theirs = {case["text"]: case["theirs"] for case in CASES}
    assert all(theirs[text] is not None for text in STRICTER)
    assert all(theirs[text] != ours for text, ours in {**END_OF_ANSWER, **PUNCTUATED}.items())


def test_a_prompt_that_is_repeated_is_no_score() -> None:
    """What made the package say 5 whatever the judge thought: its own prompt holds (Score 5)."""
    for reference in ("It is.", None):
        messages = absolute_messages("Say it.", "It is.", rubric_text("honesty"), reference)
        prompt = messages[1]["content"]
        assert parse_score(prompt) is None
        assert parse_score(f"{prompt}\nThe response equals the reference (Score 5)") is None
        assert parse_score(f"{prompt}\nFine. [RESULT] 3") == 3
        prompt = relative_messages("Say it.", "x", "y", rubric_text("honesty"), reference)[1][
            "content"
        ]
        assert parse_verdict(prompt) is None
        assert parse_verdict(f"{prompt} y is better. [RESULT] B") == "B"


PUBLISHED = {  # SHA-256 of the texts in prometheus_eval/prompts.py at the commit of prometheus.json
    "absolute_system": "526b5b77a2d7eeaf",
    "relative_system": "2d7f53af02b6a37c",
    "absolute": "edf9508ea2ca3c4f",
    "absolute_without_reference": "f4358c8f7953f324",
    "relative": "b63ae34a2bac0ce1",
    "relative_without_reference": "ca920719db01d48a",
    "helpfulness": "ab964285e9be68f6",
    "harmlessness": "66d74a93f40ee9ed",
    "honesty": "acd5d7237caa8e52",
    "factual_validity": "4df98867518a649f",
    "reasoning": "c9c1afc0cf2104e1",
}


def test_the_prompts_are_the_published_ones() -> None:
    texts = {**_published()["prompts"], **_published()["rubrics"]}
    found = {n: hashlib.sha256("\n".join(t).encode()).hexdigest()[:16] for n, t in texts.items()}
    assert found == PUBLISHED


def test_messages_hold_everything_once() -> None:
    system, user = absolute_messages("Say {it}.", "It {is}.", rubric_text("honesty"), "So {be} it.")
    assert system["role"] == "system"
    assert system["content"].startswith("You are a fair judge assistant tasked")
    assert (
        "###The instruction to evaluate:\nSay {it}.\n\n###Response to evaluate:\nIt {is}.\n"
        in user["content"]
    )
    assert "###Reference Answer (Score 5):\nSo {be} it.\n" in user["content"]
    assert "Score 5: The model consistently delivers responses that are truthful" in user["content"]
    assert user["content"].endswith("###Feedback: ")
    assert (
        "Reference Answer" not in absolute_messages("i", "r", "[c]\nScore 1: s", None)[1]["content"]
    )
    text = relative_messages("i", "x", "y", rubric_text("reasoning"), None)[1]["content"]
    assert "###Response A:\nx\n\n###Response B:\ny\n" in text
    # As the package does: a comparison sees the criterion, not what each score means.
    assert "demonstrate logical and effective reasoning" in text
    assert "Score 1:" not in text
