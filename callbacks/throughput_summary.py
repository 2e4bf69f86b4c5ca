"""Statistics of timed training steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One optimizer step of the whole run, all devices together.

    Attributes:
        flops: what the model needs for these tokens.
        seconds: from the end of the step before to its own end.
        wait_seconds: the part of it before its batch was there.
    """

    context_length: int
    tokens: int
    flops: float
    seconds: float
    wait_seconds: float


def summarise(steps: Collection[TimedStep], peak_flops: float | None) -> dict[str, Any]:
    """Rates, the step time's median and spread, and MFU if the devices' joint peak is known."""
    seconds = sum(step.seconds for step in steps)
    if not seconds:
        return {"num_steps_timed": len(steps)}
    tokens = sum(step.tokens for step in steps)
    p10, median, p90 = np.percentile([step.seconds for step in steps], [10, 50, 90])
    summary = {
        "num_steps_timed": len(steps),
        "tokens_timed": tokens,
        "tokens_per_s": tokens / seconds,
        "step_time_median_s": float(median),
        "step_time_p10_s": float(p10),
        "step_time_p90_s": float(p90),
        "data_wait_share": sum(step.wait_seconds for step in steps) / seconds,
    }
    if peak_flops is not None:
        summary["mfu"] = sum(step.flops for step in steps) / seconds / peak_flops
    return summary


def summarise_by_context_length(
    steps: Collection[TimedStep], num_seen: dict[int, int], peak_flops: float | None
) -> list[dict[str, Any]]:
    """One row a context length in `num_seen`, which also counts the steps that were not timed."""
    return [
        {
            "context_length_tokens": length,
            "num_steps": num_seen[length],
            **summarise([s for s in steps if s.context_length == length], peak_flops),
        }
        for length in sorted(num_seen)
    ]
