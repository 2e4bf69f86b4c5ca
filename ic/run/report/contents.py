"""What a run's report says: read from the files that the run left, whichever are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ic.display.numbers import clock_text, gib, percent, short_number, tokens
from ic.errors import UsageError
from ic.evaluation.registry import build_suite, suite_names
from ic.files.json_lines import read_rows
from ic.files.results import read_json
from ic.files.run_folder import ReportFolder, RunFolder
from ic.files.saved_config import read_config
from ic.model import MLAConfig
from ic.model.cost import cache_bytes_per_token, num_parameters
from ic.tracking.csv_logger import read_metrics

# Rows of a results file that a section of their own shows.
_TOLD = ("training", "memory")
_NO_RESULTS = "it has not ended, or was stopped: there is no results.json"
_SAMPLES_SHOWN = 6


@dataclass(frozen=True)
class Table:
    """Heads and lines of text; the first column names the line."""

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Part:
    """A section: what it says, its tables, and pictures by what they show.

    Attributes:
        folded: it is shown once it is opened.
    """

    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    texts: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True)
class Contents:
    """All of it.

    Attributes:
        facts: what a reader wants to know first.
        warnings: what makes the rest less than it seems.
        rows: of `metrics.csv`.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    parts: Sequence[Part]


def read_contents(run: RunFolder, results: Mapping[str, Any] | None = None) -> Contents:
    """Read a run's folder.

    Args:
        results: of a run that is just ending, whose `results.json` is not written yet.

    Raises:
        UsageError: the folder holds no run.
        ValueError: a file in it is damaged.
    """
    if not run.config.is_file():
        raise UsageError(
            f"run={run.path}: no run has written {run.config}; give a run's folder such as "
            "runs/mla_tiny/default"
        )
    config = read_config(run.config)
    found = dict(results if results is not None else _json(run.results))
    throughput, memory = _json(run.throughput), _json(run.memory())
    metrics = read_metrics(run.metrics)
    rows = found.get("rows", [])
    parts = [
        *_evaluations(run, rows),
        _throughput(throughput),
        _memory(run, memory),
        *_others(rows),
        _samples(run),
        _environment(found),
        Part("Configuration", f"{run.config.name}, defaults included", folded=True,
             texts=[run.config.read_text()]),
    ]  # fmt: skip
    return Contents(
        name=f"{run.path.parent.name}/{run.path.name}",
        facts=_facts(run, config, found, throughput, metrics),
        warnings=list(_warnings(run, found)),
        rows=metrics,
        parts=[part for part in parts if part is not None],
    )


def _facts(
    run: RunFolder,
    config: Mapping[str, Any],
    found: Mapping[str, Any],
    throughput: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str]]:
    facts = [("status", str(found.get("status", "finished" if found else _NO_RESULTS)))]
    steps, asked = throughput.get("last_step"), (config.get("trainer") or {}).get("max_steps")
    if steps is not None:
        of = f" of {asked:,}" if isinstance(asked, int) and asked > 0 else ""
        facts.append(("optimizer steps", f"{steps:,}{of}"))
    if (seen := throughput.get("tokens_seen")) is not None:
        facts.append(("tokens seen", f"{seen:,}"))
    facts += _time(throughput)
    lengths = [row["context_length_tokens"] for row in throughput.get("by_context_length", ())]
    if lengths:
        facts.append(("longest training text", f"{max(lengths):,} tokens"))
    if (run.last / "config.json").is_file():
        model = MLAConfig.from_pretrained(run.last)
        facts.append(("parameters", f"{num_parameters(model):,}"))
        facts.append(("bf16 cache per token", f"{cache_bytes_per_token(model):,} bytes"))
    for name, metric in (("training loss", "train/loss"), ("validation loss", "val/loss")):
        if values := [row for row in metrics if row.get(metric)]:
            last = values[-1]
            facts.append(
                (f"last {name}", f"{float(last[metric]):.4f} (step {int(last['step']) + 1:,})")
            )
    for key in ("device", "commit", "date"):
        if key in found:
            facts.append((key, str(found[key])))
    return facts


def _time(throughput: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """How long its steps took, and on how much; not what stood between them, nor the untimed ones.
    What that costs depends on prices, which `python -m ic cost` has.
    """
    timed = throughput.get("num_steps_timed")
    if not timed:
        return
    seconds, devices = (
        throughput["tokens_timed"] / throughput["tokens_per_s"],
        throughput["num_devices"],
    )
    steps = f"{timed:,} of {throughput['num_steps']:,} steps"
    yield "training time", f"{clock_text(seconds)} in {steps}"
    if throughput["device"] != "cpu":
        yield "GPUs", f"{devices:,} x {throughput['device']}"
        yield "GPU hours", f"{seconds * devices / 3600:,.2f} in {steps}"


def _warnings(run: RunFolder, found: Mapping[str, Any]) -> Iterable[str]:
    if str(found.get("commit", "")).endswith("+changes"):
        yield "The code differed from its commit when this was measured."
    if skipped := len(read_rows(run.guardrails)):
        yield f"The guardrails skipped {skipped:,} steps; {run.guardrails.name} names them."


def _evaluations(run: RunFolder, rows: Sequence[Mapping[str, Any]]) -> Iterable[Part]:
    """The suites that `fit` asked at its end, and what `evaluate` measured afterwards."""
    for name in suite_names():
        if of_suite := [dict(row) for row in rows if row["what"] == name]:
            suite = build_suite(name)
            picture = run.suite(name).picture(suite.picture)
            table = Table(*suite.published(of_suite))
            yield Part(
                f"Evaluation: {suite.title}",
                f"Suite {name}, asked at the end of training. Synthetic: {suite.synthetic}. "
                f"{suite.answering}, and intervals are of 95 %.{_explained(table)}",
                [table],
                {suite.title: picture},
            )
    for step in run.evaluated_steps():
        for folder in ReportFolder(run.evaluation(step)).suites:
            measured = _json(folder.results)
            if shown := measured.get("shown"):
                table = Table(shown["heads"], shown["lines"])
                yield Part(
                    f"Step {step:,} evaluated: {shown['title']}",
                    f"Suite {measured['config']['suite']}, measured {measured['date']} by "
                    f"{measured['command']}. Synthetic: {shown['synthetic']}. "
                    f"{shown['answering']}, and intervals are of 95 %.{_explained(table)}",
                    [table],
                    {shown["title"]: folder.picture(shown["picture"])},
                )


def _explained(table: Table) -> str:
    """The words of a table of needles, for who has not read the documentation."""
    if "no needle" not in table.heads:
        return ""
    return (
        " A needle is what the model has to find in a long prompt, and its depth is where it "
        "stands there. Without a needle every answer should be wrong."
    )


def _throughput(found: Mapping[str, Any]) -> Part | None:
    if not found.get("num_steps_timed"):
        return None
    lines = [
        [
            "all" if length is None else tokens(length),
            f"{row['num_steps']:,}",
            short_number(row["tokens_per_s"]) if "tokens_per_s" in row else "-",
            *(f"{row[key]:.3g}" if key in row else "-" for key in _STEP_TIMES),
            percent(row.get("data_wait_share"), 1),
            percent(row.get("mfu"), 1),
        ]
        for row in (*found.get("by_context_length", ()), found)
        for length in [row.get("context_length_tokens")]
    ]
    heads = [
        "context",
        "steps",
        "tokens/s",
        "median step, s",
        "fastest tenth, s",
        "slowest tenth, s",
    ]
    note = (
        f"{found['num_devices']} x {found['device']}, precision {found['precision']}. Rates are of "
        f"all devices together; the first {found['warmup_steps_per_context_length']} steps at each "
        "length are not timed."
    )
    return Part("Throughput", note, [Table([*heads, "waiting for data", "MFU"], lines)])


_STEP_TIMES = ("step_time_median_s", "step_time_p10_s", "step_time_p90_s")


def _memory(run: RunFolder, found: Mapping[str, Any]) -> Part | None:
    phases = found.get("phases")
    if not phases:
        return None
    kinds = list(next(iter(phases.values()))["split_bytes"])
    large = found["run_peak_bytes"] >= 2**33
    unit, scale, digits = ("GiB", 2**30, 2) if large else ("MiB", 2**20, 1)
    lines = [
        [
            name.replace("_", " "),
            f"{phase['split_of_bytes'] / scale:,.{digits}f}",
            *(f"{phase['split_bytes'][kind] / scale:,.{digits}f}" for kind in kinds),
        ]
        for name, phase in phases.items()
    ]
    of = "the whole process" if found["meter"] == "process_rss" else "the GPU's allocator"
    return Part(
        "Memory",
        f"{unit} of {of}, on rank {found['rank']} of {found['world_size']}; the highest of the "
        f"run is {gib(found['run_peak_bytes'], 2)}.",
        [Table(["phase", "peak", *kinds], lines)],
        {"memory by phase of a training step": run.memory_plot()},
    )


def _others(rows: Sequence[Mapping[str, Any]]) -> Iterable[Part]:
    """Rows of any other kind as they stand in the results file: a callback need not be known."""
    known = {*_TOLD, *suite_names()}
    for kind in dict.fromkeys(row["what"] for row in rows if row["what"] not in known):
        of_kind = [row for row in rows if row["what"] == kind]
        heads = [
            key for key in dict.fromkeys(key for row in of_kind for key in row) if key != "what"
        ]
        lines = [[_in_table(head, row.get(head)) for head in heads] for row in of_kind]
        title = kind.replace("_", " ").capitalize()
        yield Part(title, "", [Table([head.replace("_", " ") for head in heads], lines)])


def _samples(run: RunFolder) -> Part | None:
    rows = read_rows(run.samples)
    if not rows:
        return None
    shown = [
        f"step {row['step']:,}: {row['prompt']}|{row['text']}" for row in rows[-_SAMPLES_SHOWN:]
    ]
    return Part(
        "Texts that the model wrote", "The last ones. A bar divides prompt and text.", texts=shown
    )


def _environment(found: Mapping[str, Any]) -> Part | None:
    lines = [
        [key, _plain(value)]
        for key, value in found.items()
        if key not in ("rows", "config", "versions", "shown")
    ]
    lines += [[name, _plain(value)] for name, value in found.get("versions", {}).items()]
    return Part("Environment", "", [Table(["", ""], lines)]) if lines else None


def _in_table(head: str, value: Any) -> str:
    """A quantity with its thousands set apart; a seed is none."""
    if head != "seed" and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int):
            return f"{value:,}"
        if 1e4 <= abs(value) < 1e15:
            return f"{value:,.0f}"
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return "-" if value is None else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON: {error}; restore it, or remove it and make the report without it"
        ) from error
