"""A named choice out of a few, with the nearest name in the error."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises:
    ValueError: `value` is not allowed; names the nearest one and all of them.
    """
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{name}={value!r}: {hint}choose one of {', '.join(allowed)}")
