"""A trainer's callbacks by type."""

from __future__ import annotations

from typing import TypeVar, cast

from lightning import Callback, Trainer

Kind = TypeVar("Kind")


def find_callback(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The first callback of a type; None without one."""
    return next((each for each in all_callbacks(trainer) if isinstance(each, kind)), None)


def all_callbacks(trainer: Trainer) -> list[Callback]:
    """The callbacks in the order in which their hooks run."""
    return cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
