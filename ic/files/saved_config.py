"""A run's saved configuration beside the one that it is to continue with.

What may differ says so beside its field: `field(default=0, metadata=MAY_CHANGE)`. A key that the
saved configuration lacks came with a later version: it had its default then, which is no change. A
key that this version no longer has cannot be given, so it is ignored; `forgotten_keys` names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

# Metadata of a field that changes how and where a run computes, what it shows and keeps, but not
# what it computes.
MAY_CHANGE = {"may_change": True}
# Parts that every run has.
_PARTS = {"model", "data", "optimizer", "trainer", "callbacks", "logger", "evaluation"}
_ABSENT = "(absent)"
_LONGEST_SHOWN = 40


def read_config(file: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says.

    Raises:
        ValueError: it is no YAML, or empty.
    """
    try:
        saved = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(
            f"{file} is no YAML: {error}; restore it, or choose another run"
        ) from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} holds no configuration; restore it, or choose another run")
    for part in _PARTS & saved.keys():
        if not isinstance(saved[part], dict):
            raise ValueError(
                f"{file}: {part} is {saved[part]!r}, no table of keys; restore it, or choose "
                "another run"
            )
    return saved


def changed_keys(saved: Mapping[str, Any], given: Any, prefix: str = "") -> Iterator[str]:
    """`key: before -> now` of each key that differs and may not.

    Args:
        saved: what was read from a `config.yaml`.
        given: the dataclass instance of the same configuration.
    """
    for part in _fixed(given):
        key, now = f"{prefix}{part.name}", getattr(given, part.name)
        before = saved[part.name] if part.name in saved else _before_it_was_there(part, now)
        if is_dataclass(now) and isinstance(before, Mapping):
            yield from changed_keys(before, now, f"{key}.")
        else:
            yield from _differences(before, _plain(now), _plain(_default(part)), key)


def forgotten_keys(saved: Mapping[str, Any], given: Any, prefix: str = "") -> Iterator[str]:
    """`key=value` of each key that the saved configuration holds and this version does not have."""
    known = {part.name for part in fields(given)}
    for name, value in saved.items():
        if name not in known:
            yield f"{prefix}{name}={value}"
    for part in _fixed(given):
        now, before = getattr(given, part.name), saved.get(part.name)
        if is_dataclass(now) and isinstance(before, Mapping):
            yield from forgotten_keys(before, now, f"{prefix}{part.name}.")


def _fixed(given: Any) -> list[Field[Any]]:
    return [part for part in fields(given) if not part.metadata.get("may_change")]


def _before_it_was_there(part: Field[Any], now: Any) -> Any:
    """What a key amounted to in a version that did not have it."""
    # A part that is switched on now: each of its keys had its own default.
    return {} if is_dataclass(now) else _plain(_default(part))


def _default(part: Field[Any]) -> Any:
    if part.default is not MISSING:
        return part.default
    return _ABSENT if part.default_factory is MISSING else part.default_factory()


def _differences(before: Any, now: Any, default: Any, key: str) -> Iterator[str]:
    """Of two plain values; tables entry by entry."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield f"{key}: {_short(before)} -> {_short(now)}"
        return
    defaults = default if isinstance(default, dict) else {}
    for name in {**before, **now}:
        entry = before.get(name, defaults.get(name, _ABSENT))
        yield from _differences(entry, now.get(name, _ABSENT), defaults.get(name), f"{key}.{name}")


def _short(value: Any) -> str:
    """A value in few characters; of a table that is there in one of the two alone, its size."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{{{len(value)} keys}}"
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _plain(value: Any) -> Any:
    """As YAML gives it back: tuples are lists."""
    given = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return yaml.safe_load(yaml.safe_dump(given, sort_keys=False))
