"""regenerate the documents' tables and pictures from docs/results

So no figure in a document is typed by hand. What stands in `DOCUMENTS` between `<!-- table: NAME
-->` and `<!-- end -->` is rewritten, and so is what `plan` takes from measured runs
(`ic/planning/measurements.json`); a test fails when one of them is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ic.display.numbers import gib, percent, tokens
from ic.errors import UsageError
from ic.evaluation.registry import build_suite, suite_names
from ic.evaluation.statistics import pool
from ic.files.atomic_write import replacing
from ic.planning.measurements import MEASUREMENTS, Measurements
from ic.studies.ablation.report import ablation_cells, training_share

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
# (name shown, file of the training run, file of the evaluation; one file may hold both)
RUNS = (
    ("`mla_tiny`", "mla_tiny-fit.json", "mla_tiny-fit.json"),
    *(
        (f"`{name}`", f"{name}-fit.json", f"{name}-passkey.json")
        for name in ("infinitecontext_1b", "mla_128k", "mla_1m")
        if (RESULTS / f"{name}-passkey.json").is_file()
    ),
)


def suite_table(name: str) -> str:
    """What an evaluation suite publishes of each run, and the commit that measured it."""
    suite = build_suite(name)
    lines = []
    for run, _, file in RUNS:
        data = _load(file)
        heads, found = suite.published([row for row in data["rows"] if row["what"] == name])
        lines += [[run, *line, data["commit"][:9]] for line in found]
    return "\n".join(_markdown(["run", *heads, "commit"], lines, left=2, text=["commit"]))


def training_table() -> str:
    """Speed and memory by run and context length."""
    lines = [
        "| run | device | context | steps | tokens/s | step, median | MFU | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, file, _ in RUNS:
        data = _load(file)
        rows = [r for r in data["rows"] if r["what"] == "training" and r["num_steps_timed"]]
        peaks = [r["peak_bytes"] for r in data["rows"] if r["what"] == "memory"]
        peak = gib(peaks[0] if peaks else None)
        # The shortest and the longest say how speed changes with context; the file has them all.
        for row in [*rows[:1], *rows[1:][-1:]]:
            mfu = percent(row.get("mfu") or None)
            lines.append(
                f"| {name} | {data['device']} | {row['context_length_tokens']:,} "
                f"| {row['num_steps_timed']} | {row['tokens_per_s']:,.0f} "
                f"| {row['step_time_median_s']:.3f} s | {mfu} "
                f"| {peak} |"
            )
    return "\n".join(lines)


def cache_table() -> str:
    """Cache memory by kind and length, and the largest context by the GPU's memory."""
    rows = _load("cache-memory.json")["rows"]
    lengths = [int(n) for n in rows[0]["cache_bytes_by_tokens"]]
    limits = sorted({row["limit_gb"] for row in rows})
    shown = [tokens(n) for n in lengths]
    gpus = (f"{limit} GB" for limit in limits)
    heads = ["cache of the 1B shape", *shown, "MB per 1k tokens", *gpus]
    lines = []
    for name in dict.fromkeys(row["cache"] for row in rows):
        here = {row["limit_gb"]: row for row in rows if row["cache"] == name}
        first = here[limits[0]]
        sizes = [
            gib(size, 2) if size else "did not fit"
            for size in first["cache_bytes_by_tokens"].values()
        ]
        per_token = f"{first['bytes_per_token'] * 1000 / 1e6:.2f}"
        largest = (f"{here[limit]['largest_context_tokens']:,}" for limit in limits)
        lines.append([name, *sizes, per_token, *largest])
    return "\n".join(_markdown(heads, lines, left=1))


def plan_table() -> str:
    """Predicted against measured peak memory of a training step."""
    lines = [
        "| case | device | predicted | measured | error | measured at |",
        "|---|---|--:|--:|--:|---|",
    ]
    for file in sorted(RESULTS.glob("plan-*.json")):
        data = _load(file.name)
        for row in data["rows"]:
            lines.append(
                f"| {row['case']} | {row['device_name']} "
                f"| {gib(row['predicted_peak_bytes'], 2)} "
                f"| {gib(row['measured_peak_bytes'], 2)} "
                f"| {100 * row['error_share']:+.1f} % "
                f"| {row.get('measured_commit', data['commit'])[:9]} |"
            )
    return "\n".join(lines)


def preference_table() -> str:
    """Preference training, ours beside TRL's: every row of the `preference-memory*.json` files."""
    lines = [
        "| context | vocabulary | side | step, median | tokens/s | peak memory | commit |",
        "|--:|--:|---|--:|--:|--:|---|",
    ]
    shown = []
    for file in RESULTS.glob("preference-memory*.json"):
        data = _load(file.name)
        vocabulary = data["config"]["vocab_size"]
        for row in data["rows"]:
            start = f"| {row['length_tokens']:,} | {vocabulary:,} | {row['side']} "
            end = f"| {data['commit'][:9]} |"
            cells = (
                f"| {row['error']} | - | - "
                if "error" in row
                else f"| {row['step_median_s']:.2f} s | {row['tokens_per_s']:,.0f} "
                f"| {gib(row['peak_bytes'])} "
            )
            shown.append((vocabulary, row["length_tokens"], row["side"], start + cells + end))
    return "\n".join([*lines, *(line for *_, line in sorted(shown))])


def scaling_table() -> str:
    """Training by strategy: every row of the `scaling*.json` files."""
    lines = [
        "| case | device | GPUs | context | tokens per step | tokens/s | MFU | GPU utilisation "
        "| peak per GPU | against gloo | efficiency |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    for file in sorted(RESULTS.glob("scaling*.json")):
        rows = _load(file.name)["rows"]
        for row in (row for row in rows if row["status"] == "measured"):
            ratio = row["ratio_to_baseline"]
            lines.append(
                f"| {row['name']} | {row['device']} | {row['num_gpus']} "
                f"| {row['context_length_tokens']:,} | {row['tokens_per_step']:,} "
                f"| {row['tokens_per_s']:,.0f} | {percent(row['mfu'])} "
                f"| {percent(row['gpu_utilisation'])} | {gib(row['peak_bytes_per_gpu'])} "
                f"| {'-' if ratio is None else f'{ratio:.2f} times'} "
                f"| {percent(row['scaling_efficiency'])} |"
            )
    return "\n".join(lines)


def ablation_table() -> str:
    """Exact answers in per cent by variant, task and length: a table an `ablation*.json`."""
    tables = []
    for file in sorted(RESULTS.glob("ablation*.json")):
        data = _load(file.name)
        heads, lines = ablation_cells(data["rows"])
        devices = sorted({row["device"] for row in data["rows"] if row["status"] == "measured"})
        share = training_share(data["rows"], data["config"]["max_time_s"])
        tables += [
            *_markdown(heads, lines, left=2),
            "",
            f"`{file.name}`: {', '.join(devices)}, {data['config']['jobs_per_gpu']} runs per GPU; "
            f"{share} of training per run; commit {data['commit'][:9]}.",
            "",
        ]
    return "\n".join(tables).rstrip("\n")


def needle_sweep_table() -> str:
    """Exact answers in per cent by variant of the needle sweep, SFT and then DPO."""
    tables = []
    for stage in ("sft", "dpo"):
        data = _load(f"needle-sweep-{stage}.json")
        heads, lines = ablation_cells(data["rows"])
        shown = [heads.index(head) for head in heads if head not in ("task", "trained to", "after")]
        steps = training_share(data["rows"], data["config"]["max_time_s"])
        named = [f"{stage.upper()}, {steps}", *(heads[i] for i in shown[1:])]
        tables += [*_markdown(named, [[line[i] for i in shown] for line in lines], left=1), ""]
    return "\n".join(tables).rstrip("\n")


# Files `infinitecontext_1b-<stage>-<kind>.json`, and what documents call them.
STAGES = {"base": "before SFT", "sft": "after SFT", "dpo": "after DPO"}
KINDS = {"distractors": "one of nine keys, conversation", "passkey": "one key, plain text"}


def alignment_table() -> str:
    """Exact answers before SFT, after it and after DPO, depths and fillers pooled."""
    found: dict[tuple[str, int], list[str]] = {}
    for kind, shown in KINDS.items():
        for stage in STAGES:
            by_length = pool(_alignment_rows(stage, kind), "length_tokens")
            for (length,) in sorted(by_length):
                found.setdefault((shown, length), []).append(str(by_length[length,]))
    heads = ["asked for", "tokens", *STAGES.values()]
    lines = [[shown, f"{length:,}", *cells] for (shown, length), cells in found.items()]
    return "\n".join(_markdown(heads, lines, left=1))


def draw_alignment() -> None:
    """`docs/images/alignment-<kind>.png`: a panel for each stage."""
    for kind, shown in KINDS.items():
        rows = [
            row | {"task": name}
            for stage, name in STAGES.items()
            for row in _alignment_rows(stage, kind)
        ]
        picture = ROOT / f"docs/images/alignment-{kind}.png"
        build_suite("passkey").draw(rows, picture, title=f"{shown}, synthetic data")


def _alignment_rows(stage: str, kind: str) -> list[dict[str, Any]]:
    """Rows of a stage that ask for a key which is there."""
    rows = _load(f"infinitecontext_1b-{stage}-{kind}.json")["rows"]
    return build_suite("passkey").counted([row for row in rows if row["what"] == "passkey"])


TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(suite_table, name) for name in suite_names()},
    "training": training_table,
    "cache": cache_table,
    "plan": plan_table,
    "preference": preference_table,
    "scaling": scaling_table,
    "ablation": ablation_table,
    "alignment": alignment_table,
    "needle_sweep": needle_sweep_table,
}
DOCUMENTS = (
    "README.md",
    "docs/ablation.md",
    "docs/alignment.md",
    "docs/parallel.md",
    "docs/planning.md",
    "docs/results.md",
)


def refresh(text: str) -> str:
    """A document with every marked table made anew.

    Raises:
        ValueError: a marker names no table.
    """

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


@dataclass
class Config:
    """Nothing to choose."""


def run(config: Config) -> int:
    if not RESULTS.is_dir():
        raise UsageError(f"tables rewrites the documents of a checkout, and {ROOT} is none")
    for document in (ROOT / name for name in DOCUMENTS):
        text = refresh(document.read_text())
        with replacing(document) as partial:
            partial.write_text(text)
    draw_alignment()
    with replacing(MEASUREMENTS) as partial:
        partial.write_text(Measurements.of_results(RESULTS).as_json())
    return 0


def _markdown(
    heads: Sequence[str], lines: Iterable[Sequence[str]], *, left: int, text: Sequence[str] = ()
) -> list[str]:
    """Lines of a table whose first `left` columns, and those headed as in `text`, are set left, the
    others right.
    """
    sides = ["---" if n < left or head in text else "--:" for n, head in enumerate(heads)]
    return [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(sides)}|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


def _load(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())
