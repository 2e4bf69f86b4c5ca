"""Values of the command line, each spelled for Hydra's grammar as the type of its field asks.

Hydra's grammar guesses a type from the spelling: `run_id=12_34` would be the number 1234, and
`prompt=größe` an error. Here the field decides. For a field that holds

- text, a number, true or false, the value is everything behind the first `=`, as it was typed;
- a list of such, `[a,b]` is read element by element, and a single value is a list of one;
- a table, `{key: value}` is read entry by entry, and JSON is such a table;
- a part of the configuration, a table sets its keys, and switches the part on if it was null.

A value in quotes, `key='...'`, is Hydra's: the quotes are taken off, and `${...}` refers to another
key. `null` is null where the field may be null. What is spelled already stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ic.config.groups import options_of
from ic.errors import UsageError
from ic.evaluation.registry import suite_config, suite_names

_OVERRIDE = re.compile(r"(\+{0,2})([\w.$-]+)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
# What Hydra's grammar reads as the field does, so that it needs no quotes.
_PLAIN = {
    str: re.compile(r"(?!(?:true|false|null|inf|nan)$)[a-z_][\w./-]*", re.IGNORECASE | re.ASCII),
    int: re.compile(r"-?(0|[1-9]\d{,17})", re.ASCII),
    float: re.compile(r"-?(0|[1-9]\d*)(\.\d+)?(e-?\d+)?", re.ASCII),
    bool: re.compile(r"true|false"),
}
_SPECIAL = "=!?;'\"&<>#(),"
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


def spell_values(schema: type, overrides: list[str]) -> list[str]:
    """Overrides whose values Hydra reads as the fields of `schema` ask.

    Args:
        schema: a verb's dataclass.

    Raises:
        UsageError: a list or table whose brackets do not match, or a value that no spelling fits.
    """
    return [line for override in overrides for line in _spell(schema, override)]


def field_type(schema: type, path: list[str]) -> Any:
    """The declared type of a key; `Any` if none is declared, or it is unknown."""
    kind: Any = schema
    for place, name in enumerate(path):
        kind, _ = _without_none(kind)
        if get_origin(kind) is dict:
            if path[:place] == ["suite"] and name in suite_names():
                kind = suite_config(name)
            else:
                kind = get_args(kind)[1]
        elif isinstance(kind, type) and is_dataclass(kind):
            kind = _fields(kind).get(name, Any)
        else:
            return Any
    return kind


def part_type(schema: type, key: str) -> type | None:
    """The dataclass of a part that may be null; None of any other key."""
    kind, optional = _without_none(field_type(schema, key.split(".")))
    return kind if optional and is_dataclass(kind) and isinstance(kind, type) else None


def is_single(declared: Any) -> bool:
    """Whether a field holds a value or a list, which have no keys."""
    kind, _ = _without_none(declared)
    return kind in _PLAIN or get_origin(kind) is list


@cache
def _fields(kind: type) -> dict[str, Any]:
    """Types of the fields of a dataclass, and of what the options of its group add to it."""
    found: dict[str, Any] = {}
    for each in (*kind.__subclasses__(), kind):
        found.update(_fields(each) if each is not kind else get_type_hints(kind))
    return found


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if get_origin(kind) in (Union, UnionType):
        rest = [each for each in get_args(kind) if each is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return kind, False


def _spell(schema: type, override: str) -> Iterator[str]:
    """The overrides that stand for one."""
    group, _, option = override.partition("=")
    if "/" in group and option == "null" and options_of(group):
        raise UsageError(f"{override}: write {override.replace('/', '.')}")
    match = _OVERRIDE.fullmatch(override)
    if match is None or override.startswith("~"):
        yield override
        return
    sign, key, value = match.groups()
    path = key.split(".")
    declared = field_type(schema, path)
    kind, optional = _without_none(declared)
    above, _ = _without_none(field_type(schema, path[:-1]) if len(path) > 1 else Any)
    if get_origin(above) is dict and get_args(above)[0] is int:
        # A dotted key is text, and this table's are numbers.
        yield f"{sign}{'.'.join(path[:-1])}={{{path[-1]}:{_element(key, value, kind)}}}"
    elif isinstance(kind, type) and is_dataclass(kind):
        yield from _part(schema, f"{sign}{key}", value, optional)
    else:
        yield f"{sign}{key}={_element(key, value, declared)}"


def _part(schema: type, key: str, value: str, optional: bool) -> Iterator[str]:
    """A part of the configuration: an option of its group, null, or a table of its keys."""
    group = key.lstrip("+").replace(".", "/")
    if value.startswith("{"):
        if optional:
            yield f"{key}={{}}"
        for name, entry in _entries(key, value):
            yield from _spell(schema, f"{key}.{name}={entry}")
    elif value == "null" and not optional:
        names = options_of(group)
        hint = f"choose one of {', '.join(names)}" if names else "set its keys"
        raise UsageError(f"{key}=null: {key} cannot be switched off; {hint}")
    elif "." in key and value in options_of(group):
        raise UsageError(f"{key}={value}: write {key.replace('.', '/')}={value}")
    elif "." in key and value != "null":
        raise UsageError(
            f"{key}={value}: {key} has keys of its own; write {key}={{key: value}} or "
            f"{key}.key=value"
            + (f", {key}={{}} to switch it on as it is, or {key}=null" if optional else "")
        )
    else:
        yield f"{key}={value}"


def _element(key: str, value: str, declared: Any) -> str:
    """One value, not a sweep of several."""
    kind, optional = _without_none(declared)
    if value == "null" and (optional or kind is not str):
        return value
    if kind in _PLAIN:
        return _scalar(value, kind)
    if get_origin(kind) is list:
        return _list(key, value, get_args(kind)[0])
    if value.startswith("{"):
        return _table(key, value, kind)
    return _list(key, value, Any) if value.startswith("[") else _guessed(value)


def _scalar(value: str, kind: type) -> str:
    if _PLAIN[kind].fullmatch(value) or _QUOTED.fullmatch(value):
        return value
    return quoted(_without_references(value))


def _list(key: str, value: str, kind: Any) -> str:
    if not value.startswith("["):
        if _QUOTED.fullmatch(value) is None and "," in value:
            raise UsageError(f"{key}={value}: write {key}=[{value}], in quotes for the shell")
        return f"[{_element(key, value, kind)}]"
    inner = _inside(key, value)
    each = [_element(key, one.strip().replace(r"\,", ","), kind) for one in _split(key, inner, ",")]
    return f"[{','.join(each)}]" if inner.strip() else "[]"


def _table(key: str, value: str, kind: Any) -> str:
    """The entries as the dataclass or the dict declares them."""
    entries = [
        f"{name}:{_element(key, entry, _entry_type(kind, name))}"
        for name, entry in _entries(key, value)
    ]
    return f"{{{','.join(entries)}}}"


def _entry_type(kind: Any, name: str) -> Any:
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return _fields(kind).get(name, Any) if isinstance(kind, type) and is_dataclass(kind) else Any


def _entries(key: str, value: str) -> Iterator[tuple[str, str]]:
    """Names and values of `{a: 1, b: x}`, or of a JSON object."""
    inner = _inside(key, value)
    for entry in _split(key, inner, ",") if inner.strip() else ():
        name, *rest = _split(key, entry, ":")
        if not rest or not (name := name.strip().strip("'\"")):
            raise UsageError(f"{key}={value}: {entry.strip()!r} is no entry; write {{key: value}}")
        yield name, ":".join(rest).strip()


def _inside(key: str, value: str) -> str:
    """What the brackets around a list or table enclose."""
    if len(value) < 2 or not value.endswith(_BRACKETS[value[0]]):
        raise UsageError(f"{key}={value}: the brackets do not match; quote text that has some")
    return value[1:-1]


def _split(key: str, text: str, separator: str) -> Iterator[str]:
    """Split where neither quotes nor brackets are open and no backslash stands; a quote opens at
    the start of a value.
    """
    start, place, closing = 0, 0, ""
    begins = True
    while place < len(text):
        char = text[place]
        if begins and char in "'\"" and (match := _QUOTED.match(text, place)):
            place = match.end()
            begins = False
            continue
        if char in _BRACKETS:
            closing += _BRACKETS[char]
        elif closing and char == closing[-1]:
            closing = closing[:-1]
        elif char == "\\" and text[place + 1 : place + 2] == separator:
            place += 1
        elif char in "]})":
            raise UsageError(f"{key}: the brackets of {text!r} do not match; quote the text")
        elif char == separator and not closing:
            yield text[start:place]
            start = place + 1
        begins = char in "[{,:" or (begins and char.isspace())
        place += 1
    if closing:
        raise UsageError(f"{key}: the brackets of {text!r} do not match; quote the text")
    yield text[start:]


def _guessed(value: str) -> str:
    """A value of no declared type: Hydra guesses, and takes a path or a sentence for text."""
    too_long = len(value) > 18 and value.lstrip("-").isdigit()  # Python reads no endless number
    if value[:1] in ("'", '"', "$") or not (too_long or any(c in value for c in _SPECIAL)):
        return value
    return quoted(value)


def quoted(text: str) -> str:
    """Text in Hydra's quotes; a backslash counts as one unless a quote follows it."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), text)
    return f"'{escaped}'"


def _without_references(text: str) -> str:
    """Text in which `${` is what it says, not OmegaConf's reference to another key."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
