"""Rows of JSON Lines: one line parsed, with what is wrong about it and where."""

from __future__ import annotations

import json
from typing import Any

_JSON_TYPES = {
    "NoneType": "null",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "str": "a string",
    "list": "an array",
    "dict": "an object",
}
# Python refuses to parse longer whole numbers, which take it too long.
_LONGEST_WHOLE_NUMBER = 4300


def json_type(value: Any) -> str:
    """What JSON calls a parsed value."""
    return _JSON_TYPES[type(value).__name__]


def parse_row(line: str, where: str, wanted: str) -> Any:
    """The value that a line holds.

    Args:
        where: file and line, for the messages.
        wanted: what a line should be, for the messages.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    begin = repr(line[:60] + ("..." if len(line) > 60 else ""))
    try:
        return json.loads(line, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}): {begin}; {wanted}"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{where}: arrays or objects nested too deeply to be read: {begin}; {wanted}"
        ) from error


def as_object(value: Any, where: str, wanted: str) -> dict[str, Any]:
    """The value of a line that has to be an object.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is {json_type(value)}; {wanted}")
    return value


def check_text(text: str, where: str, key: str) -> None:
    """Refuse what no tokenizer can encode.

    Raises:
        ValueError: half a surrogate pair, which JSON can spell.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where}: "{key}" holds half a surrogate pair at character {error.start}; '
            "write the character as UTF-8 or as both halves"
        ) from error


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_WHOLE_NUMBER else float(digits)
