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
    """A callback that can end a run before its time, in training or in the evaluation after it."""

    @property
    def interrupted(self) -> bool:
        """Whether it did."""

    @property
    def asked(self) -> bool:
        """Whether this process has been asked to; the others may not have been."""

    def agree(self, trainer: Trainer) -> None:
        """Have `interrupted` say on all ranks whether any was asked; every rank calls this."""

    def finish(self, trainer: Trainer) -> int:
        """What is left to do once loggers are closed -> exit code of this process."""


@runtime_checkable
class Evaluates(Protocol):
    """A callback that evaluates once training has ended."""

    @property
    def cut_short(self) -> bool:
        """Whether it was stopped; what it has measured so far is kept for the resume."""


def measured_rows(trainer: Trainer) -> list[dict[str, Any]]:
    """The rows of all callbacks."""
    return [
        row for each in all_callbacks(trainer) if isinstance(each, Measures) for row in each.rows
    ]


def asked_to_stop(trainer: Trainer) -> bool:
    """Whether anything has asked this process to end the run before its time."""
    return any(each.asked for each in all_callbacks(trainer) if isinstance(each, Interrupts))


def agree_to_stop(trainer: Trainer) -> None:
    """Have all ranks know what any of them was asked; every rank calls this."""
    for each in all_callbacks(trainer):
        if isinstance(each, Interrupts):
            each.agree(trainer)


def evaluation_incomplete(trainer: Trainer) -> bool:
    """Whether an evaluation after the training was ended before its time."""
    return any(each.cut_short for each in all_callbacks(trainer) if isinstance(each, Evaluates))


def interruption(trainer: Trainer) -> Interrupts | None:
    """The first callback that ended the run before its time."""
    found = (each for each in all_callbacks(trainer) if isinstance(each, Interrupts))
    return next((each for each in found if each.interrupted), None)
