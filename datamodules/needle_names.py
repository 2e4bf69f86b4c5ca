"""Names of splits, fillers, needle tasks and prompts, from which a configuration chooses."""

from __future__ import annotations

SPLITS = ("train", "validation", "test")
FILLERS = ("noise", "random")
TASKS = ("single", "multi_key", "multi_value", "multi_query")
PROMPTS = ("chat", "plain")

# Of data=retrieval: what is asked (datamodules/facts/exercises.py), and what it is strewn into.
RETRIEVAL_TASKS = (
    "fact",
    "profile",
    "block",
    "owner",
    "values",
    "entities",
    "order",
    "variables",
    "repeated",
    "nonliteral",
    "recall",
)
HAYSTACKS = ("noise", "random", "words", "text")
# Where its questions stand.
QUESTION_PLACES = ("along", "end", "chat")
