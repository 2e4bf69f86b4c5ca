"""A finished run of an ablation, read from its folder."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from ic.evaluation.registry import build_suite
from ic.evaluation.statistics import pool
from ic.files.results import is_finished, read_json
from ic.files.run_folder import RunFolder


def read_run(folder: Path) -> dict[str, Any]:
    """The measured part of a row.

    `context_lengths`: at which step, and after how many seconds of training, each length was
    reached. `passkey`: by task and length, depths and fillers pooled, without the control.

    Raises:
        ValueError: the run was configured not to write what a row needs.
    """
    run = RunFolder(folder)
    results, speed = read_json(run.results), read_json(run.throughput)
    if not is_finished(run.results):
        raise ValueError(f"{folder}: no finished run; {run.results.name} says how far it is")
    cells = [row for row in results.get("rows", []) if row["what"] == "passkey"]
    if not speed:
        raise ValueError(f"{folder}: no {run.throughput.name}; leave callbacks.throughput on")
    if not cells:
        raise ValueError(f"{folder}: no passkey answers in {run.results.name}")
    config = results["config"]
    if config["callbacks"]["context_length"] is None:
        length = config["data"]["context_length"]
        reached = [{"context_length_tokens": length, "step": 0, "elapsed_s": 0.0}]
    else:
        reached = read_json(run.context_length)["reached"]
    return {
        "device": results["device"],
        "commit": results["commit"],
        "context_lengths": reached,
        "steps": speed["last_step"],
        # A run that began from another run's checkpoint does not know that run's tokens.
        "tokens": None if speed["first_step"] else speed["tokens_seen"],
        "final_train_loss": _final_loss(run.metrics),
        "passkey": _pooled(cells),
    }


def _final_loss(metrics: Path) -> float | None:
    """`train/loss` of the last logged step; None if it is not a finite number."""
    with metrics.open(newline="") as lines:
        logged = [row["train/loss"] for row in csv.DictReader(lines) if row.get("train/loss")]
    loss = float(logged[-1]) if logged else math.nan
    return loss if math.isfinite(loss) else None


def _pooled(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pooled = pool(build_suite("passkey").counted(cells), "task", "length_tokens")
    return [
        {
            "task": task,
            "length_tokens": length,
            "n": answers.n,
            "correct": answers.correct,
            "accuracy": answers.share,
        }
        for (task, length), answers in pooled.items()
    ]
