"""What every server's limits must be. Imports no PyTorch: refusals come at once."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

# A day: what a server waits for longer is never meant.
_LONGEST_S = 86_400.0


def check_seconds(group: str, options: Any) -> None:
    """Check the fields of a dataclass that end in `_s`.

    Raises:
        ValueError: a field in seconds is out of range.
    """
    for each in fields(options):
        value = getattr(options, each.name)
        if each.name.endswith("_s") and not 0 < value <= _LONGEST_S:
            raise ValueError(
                f"{group}.{each.name}={value}: must be above 0 and at most {_LONGEST_S:.0f} seconds"
            )


def check_limits(group: str, options: Any) -> None:
    """Check a dataclass whose fields are seconds or numbers; null is no limit.

    Raises:
        ValueError: a field in seconds is out of range, or a number below 1.
    """
    check_seconds(group, options)
    for each in fields(options):
        value = getattr(options, each.name)
        if not each.name.endswith("_s") and value is not None and value < 1:
            raise ValueError(f"{group}.{each.name}={value}: must be at least 1")
