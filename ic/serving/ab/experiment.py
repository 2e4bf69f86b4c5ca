"""The running experiment: the split, the guardrails, the log, and what of it outlives a restart."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ic.errors import UsageError
from ic.files.json_lines import append_row
from ic.files.run_folder import ExperimentFolder
from ic.serving.ab.betting import ShareTest
from ic.serving.ab.options import GuardrailOptions, RouteOptions
from ic.serving.ab.outcomes import user_hash
from ic.serving.ab.split import Split, slot_of
from ic.serving.ab.state import State, read_state, write_state

# Outcomes of the control that tell whether going back to it would help.
_RECENT = 50


class _Guardrails:
    """Of one version: a test of its errors and one of its slow answers."""

    def __init__(self, options: GuardrailOptions, level: float) -> None:
        self._level = level
        self._tests = {
            name: (limit, ShareTest(limit))
            for name, limit in (
                ("errors", options.max_error_share),
                ("slow answers", options.max_slow_share),
            )
            if limit is not None
        }
        self._failed = dict.fromkeys(self._tests, 0)

    def add(self, failed: Mapping[str, bool | None], control: Mapping[str, deque[bool]]) -> str:
        """Count an outcome -> why the version is to be rolled back, or nothing.

        Args:
            failed: by the name of the guardrail; None where the outcome says nothing.
            control: recent outcomes of the control: where it breaks the limit as well, going back
                to it would not help.
        """
        for name, (limit, test) in self._tests.items():
            if (one := failed[name]) is None:
                continue
            test.add(one)
            self._failed[name] += one
            recent = control[name]
            helps = not recent or sum(recent) / len(recent) <= limit
            if helps and bool(test.refuted(self._level)):
                return (
                    f"{self._failed[name]:,} {name} in {test.outcomes:,} requests, which is more "
                    f"than the {100 * limit:g} % allowed (always-valid test at {self._level:g})"
                )
        return ""


class Experiment:
    """Which user gets which version, and what came of it.

    Attributes:
        rollbacks: how often a version was rolled back since the start, per version.
        unlogged: rows that could not be written, because a disk was full, say.

    Args:
        options: the router's; what the folder holds of an earlier router with the same options
            goes on.

    Raises:
        UsageError: the folder holds another experiment, or a version with a weight that was rolled
            back.
    """

    def __init__(self, options: RouteOptions) -> None:
        self.folder = ExperimentFolder(options.folder)
        self.control = options.the_control
        self.rollbacks = dict.fromkeys(options.versions, 0)
        self.unlogged = 0
        self._options = options
        guards = [options.guardrail.max_error_share, options.guardrail.max_slow_share]
        tests = (len(options.versions) - 1) * sum(limit is not None for limit in guards)
        self._level = options.guardrail.level / max(1, tests)
        self._state = self._begin(options)
        self._seen = write_state(self.folder, self._state)
        self._recent: dict[str, deque[bool]] = {
            name: deque(maxlen=_RECENT) for name in ("errors", "slow answers")
        }
        self._guards = {version: self._guardrails() for version in options.versions}
        self.log(
            what="begin",
            experiment=options.experiment,
            control=self.control,
            weights=self.split.weights,
        )

    def _begin(self, options: RouteOptions) -> State:
        found = read_state(self.folder)
        if found is None:
            return State(
                options.experiment, self.control, options.weights, Split.of(options.weights), {}
            )
        if (found.experiment, set(found.split.versions)) != (
            options.experiment,
            set(options.versions),
        ):
            raise UsageError(
                f"output={self.folder.path}: holds the experiment {found.experiment} of "
                f"{', '.join(found.split.versions)}; choose another output="
            )
        if found.asked == options.weights:
            return found.with_control(self.control)
        return found.with_weights(options.weights, asked=options.weights).with_control(self.control)

    def _guardrails(self) -> _Guardrails:
        return _Guardrails(self._options.guardrail, self._level)

    @property
    def split(self) -> Split:
        return self._state.split

    @property
    def rolled_back(self) -> dict[str, str]:
        """Versions that were rolled back, and why."""
        return dict(self._state.rolled_back)

    def version_of(self, user: str) -> str:
        return self.split.version_at(slot_of(self._options.experiment, user))

    def name_of(self, user: str) -> str:
        """What the log calls a user."""
        return user_hash(self._options.experiment, user)

    def observe(self, version: str, *, failed: bool | None, slow: bool | None) -> None:
        """Count an outcome for the guardrails, and roll the version back if it is one too many.

        Args:
            failed: whether it was not answered; None where that says nothing of the version.
            slow: whether its first byte came late; None where that is not known.
        """
        outcome = {"errors": failed, "slow answers": slow}
        if version == self.control:
            for name, one in outcome.items():
                if one is not None:
                    self._recent[name].append(one)
        elif self.split.weights[version] and (
            why := self._guards[version].add(outcome, self._recent)
        ):
            self._roll_back(version, why)

    def _roll_back(self, version: str, why: str) -> None:
        weights = self.split.weights
        weights[self.control] += weights[version]
        weights[version] = 0.0
        self._state = self._state.rolling_back(version, why, weights)
        self.rollbacks[version] += 1
        print(f"{version} is rolled back: {why}", file=sys.stderr, flush=True)
        self._told(f"guardrail of {version}: {why}", {version: why})
        try:
            self._seen = write_state(self.folder, self._state)
        except OSError as error:
            print(f"{self.folder.state}: {error.strerror}", file=sys.stderr, flush=True)

    def follow_file(self) -> None:
        """Take over a split that `python -m ic ab` has written, if there is one."""
        try:
            stamp = self.folder.state.stat().st_mtime_ns
            if stamp == self._seen:
                return
            self._seen = stamp
            found = read_state(self.folder)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            print(f"the split is kept: {error}", file=sys.stderr, flush=True)
            return
        if found is None or set(found.split.versions) != set(self.split.versions):
            print(f"{self.folder.state}: has other versions; the split is kept", file=sys.stderr)
            return
        for version, weight in found.split.weights.items():
            if weight and not self.split.weights[version]:
                self._guards[version] = self._guardrails()  # it begins anew
        self._state = found.with_control(self.control)
        self._told("changed by hand", {})

    def _told(self, why: str, rolled_back: Mapping[str, str]) -> None:
        self.log(what="weights", weights=self.split.weights, why=why, rolled_back=dict(rolled_back))

    def log(self, **row: Any) -> None:
        """Add a row; a disk that is full costs the row, not the answer."""
        try:
            append_row(self.folder.outcomes, {"time": round(time.time(), 3), **row})
        except OSError as error:
            if not self.unlogged:
                print(f"outcomes are lost: {error}", file=sys.stderr, flush=True)
            self.unlogged += 1


@contextmanager
def alone(folder: ExperimentFolder) -> Iterator[None]:
    """Keep a second router out of a folder, whose log one process alone writes.

    Raises:
        UsageError: another router uses it.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UsageError(
            f"output={folder.path}: another router writes there; choose another output="
        ) from None
    try:
        yield
    finally:
        os.close(lock)
