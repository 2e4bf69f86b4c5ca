"""Parameters within the limits of MLflow's servers; what is beyond them goes to a file."""

from __future__ import annotations

import re

LONG = "long_parameters.json"
# What every server since 1.28 takes; the name of a parameter, and its value.
_KEY_LENGTH, _VALUE_LENGTH = 250, 500
_KEY = re.compile(r"[\w./ -]+")


def as_parameters(values: dict[str, str]) -> dict[str, str]:
    """What MLflow takes as parameters: of a long value only where it is."""
    return {
        key: value if len(value) <= _VALUE_LENGTH else f"in {LONG}"
        for key, value in values.items()
        if len(key) <= _KEY_LENGTH and _KEY.fullmatch(key)
    }
