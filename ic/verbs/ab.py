"""shares of users between versions: shown and changed, of a router, Helm values or an HTTPRoute"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ic.errors import UsageError

POSITIONAL = ("split",)
LOADS_PYTORCH = False


@dataclass
class Config:
    """The verb `ab`: the split of an experiment.

    Attributes:
        split: the folder of a router (`ab route`), which follows the change within a second; or a
            file: values of the Helm chart with `versions`, or the manifest of an HTTPRoute.
        weights: new weights by version, in per cent, that sum to 100; without them the split is
            shown. Of a router only the share that must move gets another version.
        again: of a router: whether a version that was rolled back may have a weight again.
        output: where the file with the new weights goes; needed for a file, and none of a router.
            Of values it holds the weights alone, for `helm upgrade -f values.yaml -f OUTPUT`.
    """

    split: str = "???"
    weights: dict[str, float] = field(default_factory=dict)
    again: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        from ic.serving.ab.split import check_weights

        if self.weights:
            check_weights("weights", self.weights)
        elif self.again or self.output:
            raise ValueError("again and output go with weights={...}, which are missing")


def run(config: Config) -> int:
    """Show the weights, or change them."""
    path = Path(config.split)
    weights, back = _of_router(config, path) if path.is_dir() else (_of_file(config, path), {})
    for version, weight in weights.items():
        why = f"  rolled back: {back[version]}" if version in back else ""
        print(f"{version}: {weight:g} %{why}")
    return 0


def _of_router(config: Config, path: Path) -> tuple[dict[str, float], dict[str, str]]:
    from ic.files.run_folder import ExperimentFolder
    from ic.serving.ab.state import read_state, write_state

    if config.output is not None:
        raise UsageError("output: a router's split is changed where it is; leave output out")
    folder = ExperimentFolder(path)
    state = read_state(folder)
    if state is None:
        raise UsageError(f"{path}: holds no split of a router ({folder.state.name})")
    if config.weights:
        state = state.with_weights(config.weights, again=config.again)
        write_state(folder, state)
    return state.split.weights, dict(state.rolled_back)


def _of_file(config: Config, path: Path) -> dict[str, float]:
    from ic.serving.ab.weights_file import read_weights, write_weights

    if not config.weights:
        return read_weights(path)
    if config.again:
        raise UsageError("again: is of a router's folder; leave it out with a file")
    if config.output is None:
        raise UsageError("weights of a file go into another one: give output=FILE.yaml")
    write_weights(path, config.weights, Path(config.output))
    print(f"written: {config.output}")
    return dict(config.weights)
