"""What one side of a comparison answered: the folders of its suites, and their samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ic.errors import UsageError
from ic.evaluation.answered import IDENTITY, cell_fields, read_samples
from ic.evaluation.registry import build_suite, suite_names
from ic.evaluation.suite import Row
from ic.files.results import read_json
from ic.files.run_folder import RunFolder, SuiteFolder, run_of, saved_step

# A sample's place: the fields of its cell, and its index in the cell.
Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Answer:
    """A sample that one model answered.

    Attributes:
        place: fields of its cell.
        expected: what was asked for, which tells whether two models had the same sample.
        score: in [0, 1]; None where there is none.
        measured: what its suite measured besides.
    """

    place: Row
    index: int
    expected: Any
    score: float | None
    measured: Row = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return (*sorted(self.place.items()), ("index", self.index))

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.place.items())
        return f"sample {self.index} of {where}"


@dataclass(frozen=True)
class SuiteAnswers:
    """What one model answered in one suite.

    Attributes:
        folder: that its answers lie in.
        model: identity of its weights.
        settings: identity of what shaped the samples.
        tokenizer: identity of the vocabulary, if it is known.
        options: what is known of those settings, for an error.
        answers: those that count, by their place.
    """

    suite: str
    folder: Path
    model: str
    settings: str
    tokenizer: str | None
    options: Row = field(compare=False)
    answers: Mapping[Key, Answer] = field(compare=False)


def find_answers(given: str | Path) -> dict[str, SuiteAnswers]:
    """Every suite that a model was measured on, by its name.

    Args:
        given: the folder of a suite, or a file in it; a folder with several of them, as `evaluate`
            writes it; a run's folder, for what was measured of its last step that was evaluated,
            and for suites that were not, what `fit` measured at its end; a checkpoint of a run.

    Raises:
        UsageError: there is nothing of the kind.
        ValueError: a file that is damaged.
    """
    path = Path(given)
    if not path.exists():
        raise UsageError(f"{given}: no such file or folder; give what `evaluate` wrote")
    found: dict[str, SuiteAnswers] = {}
    for folder in _suite_folders(path):
        answers = _read(folder)
        found.setdefault(answers.suite, answers)
    if not found:
        raise UsageError(
            f"{given}: holds no answers of an evaluation (samples.jsonl); give a folder that "
            "`evaluate` wrote, or a run's folder"
        )
    return found


def _suite_folders(path: Path) -> Iterator[SuiteFolder]:
    """Folders that hold answers; what comes first counts."""
    if path.is_file():
        path = path.parent
    if (own := SuiteFolder(path)).holds_answers:
        yield own
    elif (run := run_of(path)) is not None:
        yield from _below(run.evaluation(saved_step(path.resolve())))
    elif (run := RunFolder(path)).config.is_file():
        yield from _last_step(path / "evaluate")
        yield from _below(path)
    elif steps := list(_last_step(path)):
        yield from steps
    else:
        yield from _below(path)


def _below(path: Path) -> Iterator[SuiteFolder]:
    folders = (SuiteFolder(folder) for folder in sorted(path.iterdir()) if folder.is_dir())
    yield from (folder for folder in folders if folder.holds_answers)


def _last_step(path: Path) -> Iterator[SuiteFolder]:
    """Suites of the last step that was evaluated, in a run's folder `evaluate`."""
    steps = [each for each in path.glob("step=*") if each.name.removeprefix("step=").isdigit()]
    for step in sorted(steps, key=lambda each: -int(each.name.removeprefix("step=")))[:1]:
        yield from _below(step)


def _read(folder: SuiteFolder) -> SuiteAnswers:
    """The answers that a folder's results tell: it may hold those of other models and settings.
    Without such results, those of the last sample's.
    """
    rows = read_samples(folder.path)
    if not rows:
        raise UsageError(f"{folder.path}: holds no answers yet; run the evaluation again")
    config = read_json(folder.results).get("config", {})
    name = config.get("suite", folder.path.name)
    if name not in suite_names():
        raise UsageError(
            f"{folder.path}: cannot tell which suite this is: it has no results.json that says so, "
            f"and its name is none of {', '.join(suite_names())}"
        )
    told = config.get("identity", rows[-1])
    of_told = [
        row for row in rows if all(row.get(name) in (told.get(name), None) for name in IDENTITY)
    ]
    if not of_told:
        raise UsageError(
            f"{folder.path}: {folder.samples.name} lacks the answers that {folder.results.name} "
            "tells of; run the evaluation again"
        )
    answers = {answer.key: answer for answer in map(answer_of, build_suite(name).counted(of_told))}
    return SuiteAnswers(
        name,
        folder.path,
        told["model"],
        told["settings"],
        told.get("tokenizer"),
        options=config.get("evaluation", {}),
        answers=answers,
    )


def answer_of(row: Row) -> Answer:
    """A sample's row, as `read_samples` gives it."""
    place = cell_fields(row)
    del place["samples"]  # how many samples a cell has is no part of what one of them is
    score = row["correct"]
    score = None if score is None else float(score)
    return Answer(place, row["index"], row["expected"], score, row.get("measured", {}))
