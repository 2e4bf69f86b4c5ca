"""The split of an experiment as a file: what a router keeps to, and `python -m ic ab` changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ic.errors import UsageError
from ic.files.atomic_write import write_json
from ic.files.results import read_json
from ic.files.run_folder import ExperimentFolder
from ic.serving.ab.split import SLOTS, Split


@dataclass(frozen=True)
class State:
    """What outlives a router.

    Attributes:
        asked: weights of the router's command: where they are others than before, they count.
        rolled_back: versions that guardrails took out, and why.
    """

    experiment: str
    control: str
    asked: Mapping[str, float]
    split: Split
    rolled_back: Mapping[str, str]

    def with_control(self, control: str) -> State:
        return replace(self, control=control)

    def with_weights(
        self,
        weights: Mapping[str, float],
        *,
        asked: Mapping[str, float] | None = None,
        again: bool = False,
    ) -> State:
        """The state with other weights.

        Args:
            again: whether versions that were rolled back may have a weight again.

        Raises:
            UsageError: they may not, or as `Split.changed`.
        """
        split = self.split.changed(weights)
        back = {version: why for version, why in self.rolled_back.items() if not weights[version]}
        if not again and (refused := self.rolled_back.keys() - back.keys()):
            version = sorted(refused)[0]
            raise UsageError(
                f"weights: {version} was rolled back ({self.rolled_back[version]}); once it is "
                "mended, give it a weight with python -m ic ab FOLDER weights={...} again=true"
            )
        return replace(self, split=split, asked=asked or self.asked, rolled_back=back)

    def rolling_back(self, version: str, why: str, weights: Mapping[str, float]) -> State:
        """The state without a version."""
        split = self.split.changed(weights)
        return replace(self, split=split, rolled_back={**self.rolled_back, version: why})


def write_state(folder: ExperimentFolder, state: State) -> int:
    """Write the file whole -> its time of change, in nanoseconds."""
    write_json(
        folder.state,
        {
            "experiment": state.experiment,
            "control": state.control,
            "asked": dict(state.asked),
            "weights": state.split.weights,
            "ranges": [list(each) for each in state.split.ranges],
            "rolled_back": dict(state.rolled_back),
        },
    )
    return folder.state.stat().st_mtime_ns


def read_state(folder: ExperimentFolder) -> State | None:
    """The state that a folder holds, if it holds one.

    Raises:
        UsageError: the file is none that this package wrote.
    """
    try:
        found: dict[str, Any] = read_json(folder.state)
        if not found:
            return None
        ranges = tuple((int(end), str(version)) for end, version in found["ranges"])
        split = Split(tuple(found["weights"]), ranges)
        ends = [end for end, _ in ranges]
        if ends != sorted(set(ends)) or ends[-1:] != [SLOTS] or split.weights != found["weights"]:
            raise ValueError("its ranges and its weights differ")
        return State(
            found["experiment"], found["control"], found["asked"], split, found["rolled_back"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder.state}: is no split of a router ({type(error).__name__}: {error}); change "
            "weights with python -m ic ab, or delete the file"
        ) from None
