"""The least and the most that an option may be, and what lies just beyond."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def check_bounds(
    options: Callable[..., Any],
    key: str,
    name: str,
    allowed: Sequence[Any],
    refused: Sequence[Any],
    **others: Any,
) -> None:
    """Each allowed value is kept; each refused one raises a ValueError that names key and value.

    Args:
        key: what the error calls the section that holds `name`, with its dot; may be empty.
        others: options that the values of this one need.
    """
    for value in allowed:
        assert getattr(options(**others, **{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"^{re.escape(f'{key}{name}={value}')}"):
            options(**others, **{name: value})
