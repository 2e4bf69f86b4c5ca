"""What was measured of a checkpoint, from the files that the measurements left.

    evaluate/step=<n>/<suite>/results.json   of a run's checkpoint, by the verb `evaluate`
    results.json                             the run's own evaluation at its end, of that step alone
    parity/parity.json                       in either place of these, and in a converted folder
    model_card.json                          what an export carries of these

Each suite becomes `{"suite", "title", "heads", "lines", ..., "metrics"}`, where `metrics` are the
numbers that the hub's `model-index` takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ic.checkpoint.card.files import CARD_FACTS
from ic.checkpoint.card.history import saved
from ic.checkpoint.source import Source
from ic.display.numbers import percent
from ic.files.publishable import publishable, published_command
from ic.files.results import is_finished
from ic.files.run_folder import ParityFolder, ReportFolder, RunFolder, run_of, saved_step

Row = dict[str, Any]


def suites_of(source: Source) -> list[dict[str, Any]]:
    """What was measured of a source, one entry a suite."""
    path = source.path.resolve()
    if source.is_gguf:
        return []
    run = run_of(path)
    if run is None:
        carried = {suite["suite"]: suite for suite in saved(path / CARD_FACTS).get("suites") or []}
        if parity := _parity(path):
            carried["parity"] = parity
        return list(carried.values())
    step = saved_step(path)
    measured = [_parity(run.evaluation(step))]
    measured += [_read(folder.results) for folder in ReportFolder(run.evaluation(step)).suites]
    found = {suite["suite"]: suite for suite in measured if suite is not None}
    for suite in _at_the_end(run, step):
        found.setdefault(suite["suite"], suite)
    return list(found.values())


def longest_measured(suites: Iterable[dict[str, Any]]) -> int | None:
    """The longest length in tokens that any suite measured."""
    lengths = [each["length_tokens"] for suite in suites for each in suite["metrics"]]
    return max((length for length in lengths if length is not None), default=None)


def _read(file: Path) -> dict[str, Any] | None:
    """What the verb `evaluate` left of a suite; None if it was stopped, or wrote no such file."""
    found = saved(file)
    shown = found.get("shown")
    if not shown:
        return None
    config = found.get("config", {})
    return {
        "suite": str(config.get("suite")),
        **publishable(
            {key: shown[key] for key in ("title", "synthetic", "answering", "heads", "lines")}
        ),
        **publishable({key: found.get(key) for key in ("commit", "date", "device")}),
        "precision": config.get("dtype"),
        "command": published_command(str(found.get("command"))),
        "metrics": publishable(_metrics(found.get("rows", []))),
    }


def _parity(folder: Path) -> dict[str, Any] | None:
    """What the verb `parity` left below a folder; None if it was not run, or was stopped."""
    found = saved(ParityFolder.within(folder).results)
    if not (shown := found.get("shown")):
        return None
    original = found["models"]["original"]
    return {
        "suite": "parity",
        "title": f"beside {publishable(original['name'])}",
        "synthetic": None,
        "answering": publishable(" ".join(found.get("notes", []))),
        **publishable({key: shown[key] for key in ("heads", "lines")}),
        **publishable({key: found.get(key) for key in ("commit", "date", "device")}),
        "precision": found["models"]["converted"]["dtype"],
        "command": published_command(str(found.get("command"))),
        "metrics": [
            _metric(
                "parity",
                "perplexity",
                row["length_tokens"],
                "perplexity",
                row["perplexity_converted"],
                row["n"],
            )
            for row in found.get("rows", [])
            if row["what"] == "logits" and row["position"] == "all"
        ],
    }


def _at_the_end(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """What a finished run measured of its last checkpoint, if that is the one of this step."""
    results = saved(run.results)
    is_last = run.last.exists() and run.last.resolve().name == run.checkpoint(step).name
    if not results or not is_last or not is_finished(run.results):
        return []
    rows = [
        row for row in results.get("rows", []) if {"length_tokens", "correct", "n"} <= row.keys()
    ]
    return [
        {
            "suite": name,
            "title": f"{name}, at the end of the training",
            "synthetic": None,
            "answering": "Answers are greedy",
            "heads": ["task", "tokens", "right", "n", "right without the key", "n"],
            "lines": _pooled_lines([row for row in rows if row["what"] == name]),
            **publishable({key: results.get(key) for key in ("commit", "date", "device")}),
            "precision": None,
            "command": published_command(str(results.get("command"))),
            "metrics": publishable(_metrics([row for row in rows if row["what"] == name])),
        }
        for name in dict.fromkeys(row["what"] for row in rows)
    ]


def _pooled_lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line a task and length: all depths together, and the controls, which hide no key."""
    lines = []
    for task, length in dict.fromkeys((row["task"], row["length_tokens"]) for row in rows):
        here = [row for row in rows if (row["task"], row["length_tokens"]) == (task, length)]
        line = [str(task), f"{length:,}"]
        for control in (False, True):
            correct, n = _count(row for row in here if (row.get("depth") == "control") == control)
            line += [percent(correct / n if n else None), str(n) if n else "-"]
        lines.append(line)
    return lines


def _count(rows: Iterable[Row]) -> tuple[float, int]:
    found = list(rows)
    return sum(row["correct"] for row in found), sum(row["n"] for row in found)


def _metrics(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The numbers of results rows that mean the same to every reader: accuracies and perplexities
    by task and length, and what the harness reports.
    """
    metrics: list[dict[str, Any]] = []
    scored = [
        row
        for row in rows
        if row.get("accuracy") is not None and row.get("n") and row.get("depth") != "control"
    ]
    for what, task, length in dict.fromkeys(
        (row["what"], row["task"], row["length_tokens"]) for row in scored
    ):
        correct, n = _count(
            row
            for row in scored
            if (row["what"], row["task"], row["length_tokens"]) == (what, task, length)
        )
        metrics.append(_metric(what, task, length, "accuracy", correct / n, n))
    for row in rows:
        if row.get("position") == "all" and row.get("perplexity") is not None:
            metrics.append(
                _metric(
                    row["what"],
                    row["task"],
                    row["length_tokens"],
                    "perplexity",
                    row["perplexity"],
                    row["n"],
                )
            )
        elif row.get("metric") is not None and row.get("value") is not None:
            metrics.append(
                _metric(row["what"], row["task"], None, row["metric"], row["value"], row["n"])
            )
    return metrics


def _metric(
    what: str, task: str, length: int | None, metric: str, value: float, n: int
) -> dict[str, Any]:
    return {
        "what": what,
        "task": task,
        "length_tokens": length,
        "metric": metric,
        "value": value,
        "n": n,
    }
