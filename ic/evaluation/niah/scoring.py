"""When an answer is right: it holds the value, whatever its case, spaces and quotation marks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# What a longer value would go on with: `4711-2` and `12.57` are not `4711` and `12`.
_GOES_ON = r"(?!\w|[-.:/@]\w)"
_WENT_ON = r"(?<!\w)(?<!\w[-.:/@])"


def normalise(text: str) -> str:
    """NFKC, case folded, white space as single spaces, no marks before the first letter or digit
    and none behind the last.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^[\W_]+|[\W_]+$", "", folded)


def begins_with(text: str, value: str) -> bool:
    """Whether an answer is a value, and goes on with something else or not at all."""
    return re.match(re.escape(normalise(value)) + _GOES_ON, normalise(text)) is not None


def holds(text: str, value: str, others: Sequence[str] = ()) -> bool:
    """Whether a value stands in an answer as a whole, and none of `others` before it."""
    at = _place(text, value)
    return at is not None and not any(
        before is not None and before < at for before in (_place(text, other) for other in others)
    )


def _place(text: str, value: str) -> int | None:
    """Where a value first stands in an answer as a whole."""
    whole = _WENT_ON + re.escape(normalise(value)) + _GOES_ON
    found = re.search(whole, normalise(text))
    return None if found is None else found.start()


def share_of_values(text: str, values: Sequence[str]) -> float:
    """Share of the values that an answer holds."""
    return sum(holds(text, value) for value in values) / len(values)
