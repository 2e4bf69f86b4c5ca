"""RULER's metrics: which of the expected strings stand in an answer, whatever their case.

After scripts/eval/evaluate.py and scripts/eval/synthetic/constants.py of NVIDIA/RULER (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def cleaned(text: str) -> str:
    """An answer as it is scored: control characters are line ends, and none surrounds it."""
    return _CONTROL_CHARACTERS.sub("\n", text.strip()).strip()


def string_match_all(text: str, outputs: Sequence[str]) -> float:
    """Share of the outputs that the answer holds."""
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)


def string_match_part(text: str, outputs: Sequence[str]) -> float:
    """1 if the answer holds one of the outputs, which are ways to say the same."""
    return float(any(output.lower() in text.lower() for output in outputs))


METRICS = {"all": string_match_all, "part": string_match_part}
