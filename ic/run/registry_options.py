"""What `register` and `promote` are asked. Imports no PyTorch: help and refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass

from ic.errors import UsageError
from ic.tracking.registry import CANDIDATE, CHAMPION, check_name
from ic.tracking.server import check_server


@dataclass
class RegisterOptions:
    """The verb `register`.

    Attributes:
        name: of the model in the registry; a new version of it is made.
        run: a run's folder: its last checkpoint, with what was measured of it.
        source: in its place any source of a model of ours, in a form that `ic.checkpoint.source`
            knows; or the Hugging Face folder of another, with a card, such as one to be converted.
        evaluation: folder that `evaluate` wrote; null is what the run has, for a source nothing.
        alias: that the new version gets; champion is given by `promote` alone.
        uri: of MLflow's server; null is $MLFLOW_TRACKING_URI.
        experiment: of MLflow, that the files of a model belong to which was not trained there.
    """

    name: str = "???"
    run: str | None = None
    source: str | None = None
    evaluation: str | None = None
    alias: str = CANDIDATE
    uri: str | None = None
    experiment: str = "registered-models"

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if (self.run is None) == (self.source is None):
            raise UsageError("give one of run=FOLDER and source=MODEL")
        if self.alias != CANDIDATE:
            check_name("alias", self.alias)
        if self.alias == "champion":
            raise UsageError("alias=champion: register a candidate, and promote it past its gate")
        if self.uri is not None:
            check_server("uri", self.uri)


@dataclass
class PromoteOptions:
    """The verb `promote`.

    Attributes:
        name: of the model in the registry.
        version: that is to become the champion; null is the alias candidate.
        judged_by: suite whose score must be at least `at_least`.
        at_least: share of the suite's answers that must be right, from 0 to 1.
        length_tokens: at this length alone; null is all of the suite.
        compare: whether the version must not be worse than the champion in any task and length that
            both were measured on, by the verdict of `compare`.
        roll_back: have the champion be the version that it replaced; nothing else is asked.
        alias: that is given.
        uri: of MLflow's server; null is $MLFLOW_TRACKING_URI.
    """

    name: str = "???"
    version: int | None = None
    judged_by: str | None = None
    at_least: float | None = None
    length_tokens: int | None = None
    compare: bool = False
    roll_back: bool = False
    alias: str = CHAMPION
    uri: str | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_name("alias", self.alias)
        if self.version is not None and self.version < 1:
            raise UsageError(f"version={self.version}: must be at least 1")
        if (self.judged_by is None) != (self.at_least is None):
            raise UsageError("judged_by= and at_least= go together: judged_by=passkey at_least=0.9")
        if self.length_tokens is not None and self.judged_by is None:
            raise UsageError(
                f"length_tokens={self.length_tokens}: give judged_by= and at_least= as well"
            )
        if self.at_least is not None and not 0 <= self.at_least <= 1:
            raise UsageError(f"at_least={self.at_least}: a share from 0 to 1")
        gated = self.compare or self.judged_by is not None
        if self.roll_back and (gated or self.version is not None):
            raise UsageError("roll_back=true goes to the version before, and takes nothing else")
        if not gated and not self.roll_back:
            raise UsageError(
                "a promotion has a gate: give judged_by=passkey at_least=0.9, or compare=true, or "
                "both"
            )
        if self.uri is not None:
            check_server("uri", self.uri)
