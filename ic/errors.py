"""A named choice out of a few, with the nearest name in the error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises:
    ValueError: `value` is not allowed; names the nearest one and all of them.
    """
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{name}={value!r}: {hint}choose one of {', '.join(allowed)}")


def check_once(name: str, values: Collection[object]) -> None:
    """Raises:
    ValueError: a value is given twice, where each stands for a row or a cell of its own.
    """
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={values}: give each one once")


class RunFailedError(RuntimeError):
    """What ends a run for a reason outside of the command line: one line, exit code 1."""


class UsageError(ValueError):
    """Something on the command line that does not exist or does not fit."""

    @classmethod
    def unknown(cls, kind: str, given: str, known: list[str]) -> UsageError:
        """`given` is not among `known`; name the nearest, or all (of nested keys the outer)."""
        last = given.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == last]  # right but for its path
        near = near or difflib.get_close_matches(given, known, n=3, cutoff=0.5)
        outer = [key for key in known if key.partition(".")[0] not in known or "." not in key]
        hint = f"did you mean {' or '.join(near[:3])}?" if near else f"known: {', '.join(outer)}"
        return cls(f"unknown {kind} {given!r}; {hint}")


# What the loader, PyTorch's allocator, the operating system and Python's threads say of it; some
# of them raise a RuntimeError, an ImportError or an OSError without a number.
_OF_NO_MEMORY = (
    "can't allocate memory",
    "annot allocate memory",
    "failed to map segment",
    "can't start new thread",
)


def lacks_memory(error: BaseException) -> bool:
    """Whether the host's memory did not suffice; a GPU's has its own report."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _OF_NO_MEMORY)


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line; the middle of an endless word is left out."""
    text = " ".join(str(error).split())
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:80]}...{word[0][-80:]}", text)
