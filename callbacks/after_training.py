"""What `fit` asks every callback once training has ended."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning import Trainer

from ic.training.find_callback import all_callbacks


@runtime_checkable
class Measures(Protocol):
    """A callback that has something for the results file."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What it measured; on rank 0."""


@runtime_checkable
class Interrupts(Protocol):
    """A callback that can end a run before its time."""

    @property
    def interrupted(self) -> bool:
        """Whether it did."""

    def finish(self, trainer: Trainer) -> int:
        """What is left to do once loggers are closed -> exit code of this process."""


def measured_rows(trainer: Trainer) -> list[dict[str, Any]]:
    """The rows of all callbacks."""
    return [
        row for each in all_callbacks(trainer) if isinstance(each, Measures) for row in each.rows
    ]


def interruption(trainer: Trainer) -> Interrupts | None:
    """The first callback that ended the run before its time."""
    found = (each for each in all_callbacks(trainer) if isinstance(each, Interrupts))
    return next((each for each in found if each.interrupted), None)
