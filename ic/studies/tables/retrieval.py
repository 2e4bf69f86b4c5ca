"""Tables of answers: what models retrieve, before and after SFT and DPO, and in ablations."""

from __future__ import annotations

from typing import Any

from ic.display.markdown import markdown
from ic.evaluation.registry import build_suite
from ic.evaluation.statistics import pool
from ic.studies.ablation.report import ablation_cells, training_share
from ic.studies.tables.published import RESULTS, load

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
        data = load(file)
        heads, found = suite.published([row for row in data["rows"] if row["what"] == name])
        lines += [[run, *line, data["commit"][:9]] for line in found]
    return "\n".join(markdown(["run", *heads, "commit"], lines, left=2, text=["commit"]))


def ablation_table() -> str:
    """Exact answers in per cent by variant, task and length: a table an `ablation*.json`."""
    tables = []
    for file in sorted(RESULTS.glob("ablation*.json")):
        data = load(file.name)
        heads, lines = ablation_cells(data["rows"])
        devices = sorted({row["device"] for row in data["rows"] if row["status"] == "measured"})
        share = training_share(data["rows"], data["config"]["max_time_s"])
        tables += [
            *markdown(heads, lines, left=2),
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
        data = load(f"needle-sweep-{stage}.json")
        heads, lines = ablation_cells(data["rows"])
        shown = [heads.index(head) for head in heads if head not in ("task", "trained to", "after")]
        steps = training_share(data["rows"], data["config"]["max_time_s"])
        named = [f"{stage.upper()}, {steps}", *(heads[i] for i in shown[1:])]
        tables += [*markdown(named, [[line[i] for i in shown] for line in lines], left=1), ""]
    return "\n".join(tables).rstrip("\n")


# Files `infinitecontext_1b-<stage>-<kind>.json`, and what documents call them.
STAGES = {"base": "before SFT", "sft": "after SFT", "dpo": "after DPO"}
KINDS = {"distractors": "one of nine keys, conversation", "passkey": "one key, plain text"}


def alignment_table() -> str:
    """Exact answers before SFT, after it and after DPO, depths and fillers pooled."""
    found: dict[tuple[str, int], list[str]] = {}
    for kind, shown in KINDS.items():
        for stage in STAGES:
            by_length = pool(alignment_rows(stage, kind), "length_tokens")
            for (length,) in sorted(by_length):
                found.setdefault((shown, length), []).append(str(by_length[length,]))
    heads = ["asked for", "tokens", *STAGES.values()]
    lines = [[shown, f"{length:,}", *cells] for (shown, length), cells in found.items()]
    return "\n".join(markdown(heads, lines, left=1))


def alignment_rows(stage: str, kind: str) -> list[dict[str, Any]]:
    """Rows of a stage that ask for a key which is there."""
    rows = load(f"infinitecontext_1b-{stage}-{kind}.json")["rows"]
    return build_suite("passkey").counted([row for row in rows if row["what"] == "passkey"])
