"""Tables of speed and memory: training, strategies, preference training, the cache, plans."""

from __future__ import annotations

from typing import Any

from ic.display.markdown import markdown
from ic.display.numbers import gib, percent, tokens
from ic.studies.tables.published import RESULTS, load
from ic.studies.tables.retrieval import RUNS


def training_table() -> str:
    """Speed and memory by run and context length."""
    lines = [
        "| run | device | context | steps | tokens/s | step, median | MFU | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, file, _ in RUNS:
        data = load(file)
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


def scaling_table() -> str:
    """Training by strategy: every row of the `scaling*.json` files."""
    lines = [
        "| case | device | GPUs | context | tokens per step | tokens/s | MFU | GPU utilisation "
        "| peak per GPU | against gloo | efficiency |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    for file in sorted(RESULTS.glob("scaling*.json")):
        rows = load(file.name)["rows"]
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


def preference_table() -> str:
    """Preference training, ours beside TRL's: every row of the `preference-memory*.json` files."""
    lines = [
        "| context | vocabulary | side | step, median | tokens/s | peak memory | commit |",
        "|--:|--:|---|--:|--:|--:|---|",
    ]
    shown = []
    for file in RESULTS.glob("preference-memory*.json"):
        data = load(file.name)
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


def cache_table() -> str:
    """Cache memory by kind and length, and the largest context by the GPU's memory."""
    rows = load("cache-memory.json")["rows"]
    lengths = [int(n) for n in rows[0]["cache_bytes_by_tokens"]]
    limits = sorted({row["limit_gb"] for row in rows})
    shown = [tokens(n) for n in lengths]
    gpus = (f"{limit} GB" for limit in limits)
    heads = ["cache of the 1B shape", *shown, "MB per 1k tokens", *gpus]
    lines = []
    for name in dict.fromkeys(map(_cache_name, rows)):
        here = {row["limit_gb"]: row for row in rows if _cache_name(row) == name}
        first = here[limits[0]]
        sizes = [
            gib(size, 2) if size else "did not fit"
            for size in first["cache_bytes_by_tokens"].values()
        ]
        per_token = f"{first['bytes_per_token'] * 1000 / 1e6:.2f}"
        largest = (f"{here[limit]['largest_context_tokens']:,}" for limit in limits)
        lines.append([name, *sizes, per_token, *largest])
    return "\n".join(markdown(heads, lines, left=1))


def _cache_name(row: dict[str, Any]) -> str:
    """The kind of cache, with the weights beside it where they are not bf16."""
    weights = row.get("weights", "bf16")  # files from before they varied do not say
    return row["cache"] if weights == "bf16" else f"{row['cache']}, weights in {weights}"


def plan_table() -> str:
    """Predicted against measured peak memory of a training step."""
    lines = [
        "| case | device | predicted | measured | error | measured at |",
        "|---|---|--:|--:|--:|---|",
    ]
    for file in sorted(RESULTS.glob("plan-*.json")):
        data = load(file.name)
        for row in data["rows"]:
            lines.append(
                f"| {row['case']} | {row['device_name']} "
                f"| {gib(row['predicted_peak_bytes'], 2)} "
                f"| {gib(row['measured_peak_bytes'], 2)} "
                f"| {100 * row['error_share']:+.1f} % "
                f"| {row.get('measured_commit', data['commit'])[:9]} |"
            )
    return "\n".join(lines)
