"""A plan as a table on the terminal, and as what `json=true` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ic.display.numbers import gib, percent
from ic.planning.advice import advice, largest_context
from ic.planning.plan import Planner

PARTS = {
    "parameters": "parameters, as the optimizer keeps them",
    "reference": "frozen reference",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "weight_copies": "weights in the compute dtype",
    "activations": "activations",
    "backward": "backward's temporaries",
    "loss": "logits and loss",
    "attention_workspace": "attention workspace",
    "optimizer_step": "optimizer's temporaries",
    "communication": "communication buffers",
    "cache": "latent cache",
    "batch": "batch",
}


def plan_report(planner: Planner) -> dict[str, Any]:
    """Everything that `plan` says, ready for JSON."""
    rows, tokens = planner.batch_shape()
    training, evaluation = planner.training(rows, tokens), planner.evaluation()
    needed = max(planner.needed_bytes(p) for p in (training, evaluation) if p is not None)
    longest = largest_context(planner)
    return {
        "experiment": planner.config.name,
        "gpu": planner.gpu.device_name,
        "gpu_memory_bytes": planner.memory_bytes,
        "num_gpus": planner.layout.num_gpus,
        "strategy": planner.layout.strategy,
        "context_parallel_size": planner.layout.context_parallel,
        "rows": rows,
        "context_length_tokens": tokens,
        "training_peak_bytes": training.total_bytes,
        "training_parts_bytes": training.parts_bytes,
        "evaluation_peak_bytes": evaluation.total_bytes if evaluation else None,
        "evaluation_parts_bytes": evaluation.parts_bytes if evaluation else None,
        "context_bytes": planner.overhead.context_bytes,
        "allocator_slack_share": planner.overhead.slack_share,
        "overhead_source": planner.overhead.source,
        "needed_bytes": needed,
        "fits": needed <= planner.memory_bytes,
        "largest_context_tokens": longest,
        "advice": advice(planner, training, evaluation, longest),
        **planner.speed(),
    }


def print_plan(report: dict[str, Any]) -> None:
    """Memory by part at both peaks, then speed and advice."""
    console = Console()
    layout = f"{report['num_gpus']} x {report['gpu']}, {report['strategy']}"
    if report["context_parallel_size"] > 1:
        layout += f", context over {report['context_parallel_size']}"
    shape = f"{report['rows']} x {report['context_length_tokens']:,} tokens"
    table = Table(title=f"{report['experiment']}: {layout}, {shape} per batch and replica")
    table.add_column("GiB on each GPU, at the peak")
    table.add_column("training step", justify="right")
    table.add_column("evaluation", justify="right")
    training = report["training_parts_bytes"]
    evaluation = report["evaluation_parts_bytes"] or {}
    for name, text in PARTS.items():
        if training.get(name) or evaluation.get(name):
            table.add_row(text, _gib(training.get(name)), _gib(evaluation.get(name)))
    table.add_section()
    peaks = report["training_peak_bytes"], report["evaluation_peak_bytes"]
    table.add_row("tensors", *map(_gib, peaks))
    slack, context = report["allocator_slack_share"], report["context_bytes"]
    table.add_row("allocator's slack", *(_gib(p and p * slack) for p in peaks))
    table.add_row("CUDA context", *(_gib(p and context) for p in peaks))
    table.add_row("needed", *(_gib(p and p * (1 + slack) + context) for p in peaks))
    console.print(table)
    say = "fits" if report["fits"] else "does NOT fit"
    lines = [
        f"{say} {_gib(report['gpu_memory_bytes'])} GiB (slack and context: "
        f"{report['overhead_source']}); longest training context that fits: "
        f"{report['largest_context_tokens']:,} tokens",
        *report["advice"],
    ]
    if report["tokens_per_s"]:
        lines.append(
            f"{report['tokens_per_s']:,.0f} tokens/s, MFU {percent(report['mfu'])} "
            f"({report['utilisation_source']}"
            + ("; linear scaling assumed)" if report["num_gpus"] > 1 else ")")
        )
    else:
        lines.append(f"tokens/s: unknown, {report['utilisation_source']}")
    lines.append(
        f"attention is {percent(report['attention_share_of_flops'])} of the FLOPs; decoding at "
        f"this length at most {report['decode_tokens_per_s_at_most']:,.0f} tokens/s per sequence "
        "(memory bandwidth)"
    )
    for line in lines:
        console.print(line, highlight=False)


def _gib(nbytes: float | None) -> str:
    return gib(nbytes or None, digits=2, unit="")


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    """Predicted and measured peaks, a row a case."""
    table = Table(title="Peak memory of a training step, GiB")
    for name in ("case", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(
            row["case"],
            _gib(row["predicted_peak_bytes"]),
            _gib(row["measured_peak_bytes"]),
            f"{100 * row['error_share']:+.1f} %",
        )
    return table
