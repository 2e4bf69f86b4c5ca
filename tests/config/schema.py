"""Every key that a verb's dataclass declares, with the type of its value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints


def walk(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys below parts too, and those that the options of a group add to it."""
    seen: set[str] = set()
    for each in (kind, *_subclasses(kind)):
        for name, declared in get_type_hints(each).items():
            if name.isupper() or name in seen:
                continue  # a constant of the class
            seen.add(name)
            part = [arg for arg in (declared, *get_args(declared)) if is_dataclass(arg)]
            if part and not str(declared).startswith("list"):
                yield from walk(part[0], f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", declared


def _subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)
