"""What earlier runs measured and `plan` uses: utilisation by length, memory outside tensors."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic.config.run import ModelConfig

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
MEMORY_FILE = "plan-memory.json"
# Backward costs twice the forward pass; checkpointing adds one forward pass.
RECOMPUTED = 4 / 3
# Used, and said so, until `plan.measure=true` has been run once.
_ASSUMED_CONTEXT_BYTES = 600 * 2**20
_ASSUMED_SLACK_SHARE = 0.05


@dataclass(frozen=True)
class Utilisation:
    """Share of the peak bf16 rate that a run of this shape reached, recomputation included.

    Attributes:
        share: interpolated linearly over the logarithm of the length.
        source: where it comes from, in words.
    """

    share: float
    source: str


@dataclass(frozen=True)
class Overhead:
    """Memory that no tensor holds.

    Attributes:
        context_bytes: CUDA context, loaded kernels and library handles.
        slack_share: what the caching allocator reserves beyond what tensors use, of the latter.
        source: measured, or assumed.
    """

    context_bytes: int
    slack_share: float
    source: str


def find_utilisation(
    model: ModelConfig, context_length: int, results: Path = RESULTS
) -> Utilisation | None:
    """Utilisation at a length out of every results file of a model of the same size, or None."""
    points: dict[int, list[float]] = {}
    files: list[str] = []
    for path in sorted(results.glob("*.json")):
        found = list(_points(json.loads(path.read_text()), model))
        if found:
            files.append(path.name)
        for length, share in found:
            points.setdefault(length, []).append(share)
    if not points:
        return None
    lengths = sorted(points)
    shares = [statistics.fmean(points[length]) for length in lengths]
    source = ", ".join(files)
    if not lengths[0] <= context_length <= lengths[-1]:
        nearest = lengths[0] if context_length < lengths[0] else lengths[-1]
        source += f", at {nearest} tokens: the nearest length measured"
    return Utilisation(_interpolate(context_length, lengths, shares), source)


def find_overhead(results: Path = RESULTS) -> Overhead:
    """Medians over the measured cases, or the assumption."""
    path = results / MEMORY_FILE
    if not path.is_file():
        return Overhead(_ASSUMED_CONTEXT_BYTES, _ASSUMED_SLACK_SHARE, "assumed, not measured")
    rows = json.loads(path.read_text())["rows"]
    return Overhead(
        int(statistics.median(row["context_bytes"] for row in rows)),
        statistics.median(
            row["measured_reserved_bytes"] / row["measured_peak_bytes"] - 1 for row in rows
        ),
        f"median of {len(rows)} cases in {MEMORY_FILE}",
    )


def measured_memory_bytes(device_name: str, results: Path = RESULTS) -> int | None:
    """Memory of this type of GPU as its driver showed it, if a measurement recorded it."""
    path = results / MEMORY_FILE
    if not path.is_file():
        return None
    for row in json.loads(path.read_text())["rows"]:
        if row["device_name"] == device_name:
            return int(row["device_memory_bytes"])
    return None


def _points(data: dict[str, Any], model: ModelConfig) -> Any:
    """(length, share of peak) of the rows that trained this size of model with this attention."""
    config = data.get("config")
    for row in data.get("rows", []) if isinstance(data.get("rows"), list) else []:
        if not isinstance(row, dict) or not row.get("mfu"):
            continue
        trained = row.get("model") or (config or {}).get("model")
        if not isinstance(trained, dict) or any(
            trained[name] != getattr(model, name)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "attention")
        ):
            continue
        factor = RECOMPUTED if trained["gradient_checkpointing"] else 1.0
        yield row["context_length_tokens"], row["mfu"] * factor


def _interpolate(length: int, lengths: list[int], shares: list[float]) -> float:
    if length <= lengths[0]:
        return shares[0]
    for i in range(1, len(lengths)):
        if length <= lengths[i]:
            low, high = math.log(lengths[i - 1]), math.log(lengths[i])
            at = (math.log(length) - low) / (high - low)
            return shares[i - 1] + at * (shares[i] - shares[i - 1])
    return shares[-1]
