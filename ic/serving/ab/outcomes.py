"""The log of an experiment: a line of JSON per request, per feedback and per change of the split.

    {"what": "begin", "time": ..., "experiment": ..., "control": ..., "weights": {...}}
    {"what": "outcome", "time": ..., "id": ..., "user": ..., "version": ..., "served_by": ...,
     "ok": true, "status": 200, "first_byte_s": ..., "seconds": ..., "route": ...}
    {"what": "feedback", "time": ..., "id": ..., "score": 1.0}
    {"what": "weights", "time": ..., "weights": {...}, "why": ...}

`version` is the one that the user has, `served_by` the one that answered. `ok` is whether the
user's own version answered; null where the client is at fault or went away, which says nothing of a
version. Users are known by a hash. Prompts, answers and tokens are not logged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ic.errors import UsageError
from ic.files.json_lines import read_rows


def user_hash(experiment: str, user: str) -> str:
    """What the log calls a user: the same in one experiment, and another name in the next."""
    return hashlib.sha256(f"user\0{experiment}\0{user}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Log:
    """Requests in the order in which they ended, as columns of N.

    Attributes:
        versions: in the order of the log, the control first.
        version: (N,) index of each request's version.
        user: (N,) a number for each user.
        ok: (N,) 1 or 0; NaN where nothing is known.
        first_byte_s, seconds: (N,) of requests that were answered; else NaN.
        score: (N,) the feedback, NaN where there is none.
        time: (N,) seconds since 1970.
        rolled_back: versions that guardrails took out, with the reason.
    """

    versions: tuple[str, ...]
    version: np.ndarray
    user: np.ndarray
    ok: np.ndarray
    first_byte_s: np.ndarray
    seconds: np.ndarray
    score: np.ndarray
    time: np.ndarray
    rolled_back: Mapping[str, str]


_COLUMNS = ("time", "id", "user", "version", "ok", "first_byte_s", "seconds")


def read_log(file: Path, control: str | None = None) -> Log:
    """Read what the router logged, or another program in the same form.

    Args:
        control: the version that others are compared with; by default the one that the log names.

    Raises:
        UsageError: no such file, no outcome in it, or no such control.
        ValueError: a line that is no JSON, or lacks what it must have.
    """
    if not file.is_file():
        raise UsageError(
            f"{file}: no such file; give the outcomes.jsonl that `ab route` writes, or its folder"
        )
    rows: list[dict[str, Any]] = []
    scores: dict[Any, float] = {}
    rolled_back: dict[str, str] = {}
    named = control
    for number, row in enumerate(read_rows(file), 1):
        what = row.get("what") if isinstance(row, dict) else None
        if what == "outcome":
            if lacks := [name for name in _COLUMNS if name not in row]:
                raise ValueError(f"{file}, line {number}: an outcome without {', '.join(lacks)}")
            _check_outcome(file, number, row)
            rows.append(row)
        elif what == "feedback":
            scores[_text(file, number, row, "id")] = _score(file, number, row.get("score"))
        elif what == "begin":
            named = control or _text(file, number, row, "control")
        elif what == "weights":
            taken_out = row.get("rolled_back") or {}
            if not isinstance(taken_out, dict):
                raise ValueError(
                    f"{file}, line {number}: rolled_back={taken_out!r} must be an object"
                )
            rolled_back |= taken_out
        else:
            raise ValueError(f"{file}, line {number}: what={what!r} is none of this log's")
    if not rows:
        raise UsageError(f"{file}: holds no outcome yet")
    versions = list(dict.fromkeys(row["version"] for row in rows))
    if named is None:
        raise UsageError(f"{file}: names no control; choose one of {', '.join(versions)}, control=")
    if named not in versions:
        raise UsageError(
            f"control={named}: has no outcome in {file}, which knows {', '.join(versions)}"
        )
    versions.sort(key=lambda version: version != named)
    users = {user: n for n, user in enumerate(dict.fromkeys(row["user"] for row in rows))}
    return Log(
        tuple(versions),
        np.array([versions.index(row["version"]) for row in rows]),
        np.array([users[row["user"]] for row in rows]),
        _floats(row["ok"] for row in rows),
        _floats(row["first_byte_s"] if row["ok"] else None for row in rows),
        _floats(row["seconds"] if row["ok"] else None for row in rows),
        _floats(scores.get(row["id"]) for row in rows),
        _floats(row["time"] for row in rows),
        rolled_back,
    )


def _check_outcome(file: Path, number: int, row: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a column holds what it cannot.
    """
    for name in ("id", "user", "version"):
        _text(file, number, row, name)
    if not (row["ok"] is None or isinstance(row["ok"], bool)):
        raise ValueError(f"{file}, line {number}: ok={row['ok']!r} must be true, false or null")
    for name in ("time", "first_byte_s", "seconds"):
        value = row[name]
        if value is None and name != "time":
            continue
        number_like = isinstance(value, int | float) and not isinstance(value, bool)
        if not number_like or not 0 <= value < math.inf:
            raise ValueError(
                f"{file}, line {number}: {name}={value!r} must be a number of seconds, at least 0"
            )


def _text(file: Path, number: int, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{file}, line {number}: {name}={value!r} must be a text")
    return value


def _score(file: Path, number: int, score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"{file}, line {number}: score={score!r} must be from 0 to 1")
    return float(score)


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else float(value) for value in values])
