"""The report of an evaluation: one page and one CSV file over all suites of a model.

Both are made anew from the suites' results files, so that a suite that is added later, or an
evaluation that was stopped and continues, joins what is there.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic.display.markdown import markdown
from ic.errors import UsageError
from ic.evaluation.answered import read_samples
from ic.evaluation.suite import Row, Suite
from ic.files.atomic_write import replacing
from ic.files.results import read_json
from ic.files.run_folder import ReportFolder, SuiteFolder

_FIRST = "what"


@dataclass(frozen=True)
class Measured:
    """What is said of a model that was measured.

    Attributes:
        name: what pictures call it.
        source: where it was loaded from.
        weights: their identity.
        trained_length: longest context in tokens that it was trained at, if that is known.
    """

    name: str
    source: str
    weights: str
    trained_length: int | None


def check_folder(report: ReportFolder, weights: str, suites: Sequence[str]) -> None:
    """Refuse a folder that the user chose and that holds answers of another model or suite.

    Raises:
        UsageError: it does; nothing of it was touched.
    """
    if report.path.exists() and not report.path.is_dir():
        raise UsageError(f"output={report.path}: is a file; give a folder")
    for folder in report.suites:
        models = {row["model"] for row in read_samples(folder.path)}
        known = read_json(folder.results).get("config", {})
        if models and weights not in models:
            name = known.get("model", {}).get("name", f"weights {sorted(models)[0]}")
            raise UsageError(
                f"output={report.path}: {folder.path} holds the answers of another model ({name}); "
                "choose another folder"
            )
        suite = known.get("suite")
        if folder.path == report.path and suite is not None and list(suites) != [suite]:
            raise UsageError(
                f"output={report.path}: holds the suite {suite}; choose another folder for "
                f"{', '.join(suites)}"
            )


def write_page(report: ReportFolder, weights: str) -> None:
    """Write the page and the CSV file of every suite below that was measured on these weights."""
    parts = [
        (folder, found)
        for folder in report.suites
        if (found := read_json(folder.results)).get("config", {}).get("model", {}).get("weights")
        == weights
    ]
    lines = [*_head(parts[-1][1])]
    for folder, found in parts:
        lines += _suite(report.path, folder, found)
    with replacing(report.document) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_csv(report.table, [row for _, found in parts for row in found["rows"]])


def _head(found: dict[str, Any]) -> list[str]:
    model = Measured(**found["config"]["model"])
    trained = "unknown" if model.trained_length is None else f"{model.trained_length:,} tokens"
    facts = [
        ["model", model.name],
        ["source", f"`{model.source}`"],
        ["weights", model.weights],
        ["trained to", trained],
        ["precision", found["config"]["dtype"]],
        ["device", found["device"]],
        ["commit", found["commit"]],
        ["versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v is not None)],
    ]
    return [f"# Evaluation of {model.name}", "", *markdown(["", ""], facts, left=2)]


def shown(suite: Suite[Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What a suite's results file keeps for the page."""
    heads, lines = suite.published(rows)
    return {
        "title": suite.title,
        "picture": suite.picture,
        "synthetic": suite.synthetic,
        "answering": suite.answering,
        "heads": heads,
        "lines": lines,
    }


def _suite(root: Path, folder: SuiteFolder, found: dict[str, Any]) -> list[str]:
    shown, config = found["shown"], found["config"]
    picture = os.path.relpath(folder.picture(shown["picture"]), root)
    return [
        "",
        f"## {config['suite']}: {shown['title']}",
        "",
        f"Measured {found['date']} by `{found['command']}`.",
        f"Synthetic: {shown['synthetic']}. {shown['answering']}, and intervals are of 95 %.",
        "",
        *markdown(shown["heads"], shown["lines"], left=1),
        "",
        f"![{shown['title']}]({picture})",
        "",
        f"Settings: `{json.dumps(config['evaluation'])}`",
    ]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row, and a column for each name that any suite's rows have."""
    names = dict.fromkeys((_FIRST, *(name for row in rows for name in row)))
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            single = {
                name: json.dumps(value) if isinstance(value, dict | list) else value
                for name, value in row.items()
            }
            writer.writerow(single)
