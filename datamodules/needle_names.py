"""Names of splits, fillers, needle tasks and prompts, from which a configuration chooses."""

from __future__ import annotations

SPLITS = ("train", "validation", "test")
FILLERS = ("noise", "random")
TASKS = ("single", "multi_key", "multi_value", "multi_query")
PROMPTS = ("chat", "plain")
