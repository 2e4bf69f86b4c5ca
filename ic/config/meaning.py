"""What each key means: its line under `Attributes:` in the docstring of its options class.

The docstrings are the one source; help and the reference page take their words from here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_ENTRY = re.compile(r"^    ((?:\w+, )*\w+): (.*)$")


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: its whole name, such as `trainer.max_steps`.
        kind: the type that its class gives it.
        default: of the class; `conf/` may give another.
        meaning: whole sentences.
    """

    name: str
    kind: str
    default: str
    meaning: str


def meanings(kind: type) -> dict[str, str]:
    """Each field of an options class -> its meaning: of a part, that of its own class where the
    class above says nothing. What no docstring mentions is left out.
    """
    hints = get_type_hints(kind)
    found = {
        each.name: _first_sentence(part)
        for each in fields(kind)
        for part in options_in(hints[each.name])
    }
    for base in reversed(kind.__mro__):
        found |= _attributes(base.__dict__.get("__doc__") or "")
    return {each.name: found[each.name] for each in fields(kind) if found.get(each.name)}


def keys_of(kind: type, prefix: str = "") -> Iterator[Key]:
    """The keys of an options class and of those below it, in order."""
    hints, known = get_type_hints(kind), meanings(kind)
    for each in fields(kind):
        name, hint = f"{prefix}{each.name}", hints[each.name]
        if each.default_factory is not MISSING:
            made = each.default_factory()
            default = "" if is_dataclass(made) else str(made)
        else:
            default = "" if each.default is MISSING else str(each.default)
        default = {"None": "null", "True": "true", "False": "false", "???": ""}.get(
            default, default
        )
        yield Key(name, _kind_name(hint), default, known.get(each.name, ""))
        for part in options_in(hint):
            yield from keys_of(part, f"{name}.")


def _first_sentence(kind: type) -> str:
    """What the docstring of an options class, or of the one it extends, begins with."""
    for base in kind.__mro__:
        words = base.__dict__.get("__doc__") or ""
        if words and not words.startswith(f"{base.__name__}("):  # the one that a dataclass makes
            whole = " ".join(inspect.cleandoc(words).split("\n\n")[0].split())
            return re.split(r"(?<=\.) ", whole)[0]
    return ""


def _attributes(docstring: str) -> dict[str, str]:
    _, _, listed = inspect.cleandoc(docstring).partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in listed.splitlines():
        if entry := _ENTRY.match(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith(" " * 8):
            for name in names:
                found[name] += f" {line.strip()}"
        elif line.strip():
            break
    return found


def options_in(hint: Any) -> list[type]:
    """The options classes that a field may hold."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [each for each in options if is_dataclass(each) and isinstance(each, type)]


def _kind_name(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        names = [_kind_name(each) for each in get_args(hint) if each is not type(None)]
        return " or ".join([*names, "null"] if type(None) in get_args(hint) else names)
    if is_dataclass(hint):
        return "part"
    if get_origin(hint) is not None:
        inner = ", ".join(_kind_name(each) for each in get_args(hint))
        return f"{get_origin(hint).__name__}[{inner}]"
    return {"Any": "any", "str": "text", "bool": "true or false"}.get(hint.__name__, hint.__name__)
