"""A sweep (`--multirun`): overrides with several values, taken apart into jobs of their own.

`key=a,b`, `key=[1],[2]`, `key={x: 1},{x: 2}`, `key=choice(a,b)` and `key=range(1,4)` have several
values. A job's overrides are those of a single run with one value of each; its folder is named for
the swept keys alone.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from hydra.errors import HydraException

from ic.errors import UsageError

_FUNCTION = re.compile(r"(range|glob|interval|tag|sort|shuffle)\(")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_MAX_VALUE_CHARS = 32
_MAX_SUFFIX_CHARS = 120
_DIGEST_CHARS = 8


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        overrides: those of a single run.
        swept: the swept keys in the order given, each with this job's value.
    """

    overrides: list[str]
    swept: dict[str, str] = field(default_factory=dict)


def sweep_jobs(overrides: Sequence[str]) -> list[SweepJob]:
    """Every combination of the values, the last key's changing fastest.

    Args:
        overrides: as given.

    Raises:
        UsageError: a value that cannot be swept over.
    """
    values = [_values(override) for override in overrides]
    several = [len(each) > 1 for each in values]
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    return [
        SweepJob(
            list(chosen),
            {
                key: each.partition("=")[2]
                for key, each, swept in zip(keys, chosen, several, strict=True)
                if swept
            },
        )
        for chosen in itertools.product(*values)
    ]


def run_id_suffix(swept: Mapping[str, str], *, digest: bool = False) -> str:
    """`lr=1e-3,seed=1`: what a job's run_id ends with, whatever the order of keys and values.

    A key is shortened to its last part where that is unique, a value to what a folder's name may
    hold.

    Args:
        swept: the keys that the folder is named for.
        digest: end with a digest, for values that are written alike.
    """
    names = short_names(list(swept))
    text = ",".join(sorted(f"{names[key]}={_safe(value)}" for key, value in swept.items()))
    if not digest and len(text) <= _MAX_SUFFIX_CHARS:
        return text
    whole = repr(sorted(swept.items()))
    return f"{text[: _MAX_SUFFIX_CHARS - _DIGEST_CHARS - 1]}-{_digest(whole)}"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key -> its last part, where that is unique among them."""
    lasts = [re.split(r"[./]", key)[-1] for key in keys]
    return {
        key: last if lasts.count(last) == 1 else key.replace("/", ".")
        for key, last in zip(keys, lasts, strict=True)
    }


def _safe(value: str) -> str:
    bare = value.strip().strip("[]{}()'\" ")
    text = re.sub(r"[^\w.+@=-]+", "-", bare) or "none"
    if len(text) <= _MAX_VALUE_CHARS:
        return text
    # The end of a path says most.
    return f"{text[-(_MAX_VALUE_CHARS - _DIGEST_CHARS - 1) :].lstrip('-.')}-{_digest(value)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]


def _values(override: str) -> list[str]:
    """The override with each of its values."""
    key, equals, value = override.partition("=")
    if not equals:
        return [override]
    if value.startswith("choice(") and value.endswith(")"):
        found = list(_split(value[len("choice(") : -1]))
    else:
        found = _enumerated(override) if _FUNCTION.match(value) else list(_split(value))
    if len(found) > 1 and not all(found):
        raise UsageError(f"{override}: an empty value between commas; write key=a,b")
    return [f"{key}={each}" for each in found]


def _enumerated(override: str) -> list[str]:
    """The values of `range(...)` and its like, by Hydra's grammar."""

    def text(element: object) -> str:
        return element if isinstance(element, str) else Transformer.str(element)  # type: ignore[arg-type]

    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():  # sort(...) of a list is a list
            return [override.partition("=")[2]]
        return [str(each) for each in parsed.sweep_iterator(text)]
    except HydraException as error:
        raise UsageError(f"{override}: {str(error).splitlines()[0]}") from error


def _split(value: str) -> Iterator[str]:
    """The parts between commas that stand in no brackets and no quotes."""
    closing: list[str] = []
    part = ""
    for char in value:
        if closing and char == closing[-1]:
            closing.pop()
        elif char in _CLOSING and (not closing or closing[-1] not in "'\""):
            closing.append(_CLOSING[char])
        elif char in "'\"" and (not part.strip() or closing) and closing[-1:] not in (["'"], ['"']):
            closing.append(char)
        elif char == "," and not closing:
            yield part.strip()
            part = ""
            continue
        part += char
    yield part.strip()
