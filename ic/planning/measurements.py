"""What earlier runs measured and `plan` uses: utilisation by length, memory outside tensors.

`measurements.json` lies beside this file, so that an installed wheel plans like a checkout. It is
an extract of docs/results that `python -m ic tables` makes anew; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ic.config.model import BaseModelConfig

MEASUREMENTS = Path(__file__).with_name("measurements.json")
# The file of `plan.measure=true` within docs/results.
MEMORY_FILE = "plan-memory.json"
# Backward costs twice the forward pass; checkpointing adds one forward pass.
RECOMPUTED = 4 / 3
# Used, and said so, until `plan.measure=true` has been run once.
ASSUMED_CONTEXT_BYTES = 600 * 2**20
ASSUMED_SLACK_SHARE = 0.05
_ALIKE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "attention")


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


@dataclass(frozen=True)
class SpeedPoint:
    """A training run's utilisation at one context length.

    Attributes:
        file: the results file that it was read from.
        preference: it trained on preference pairs, whose many short sequences use a GPU less.
        share: of the peak bf16 rate, recomputation included.
    """

    file: str
    preference: bool
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention: str
    context_length_tokens: int
    share: float


@dataclass(frozen=True)
class MemoryCase:
    """A row of `plan.measure=true`: what the GPU has, and what a run took of it outside tensors."""

    device_name: str
    device_memory_bytes: int
    context_bytes: int
    measured_peak_bytes: int
    measured_reserved_bytes: int


@dataclass(frozen=True)
class Measurements:
    """All that `plan` takes from runs that were measured."""

    speed: tuple[SpeedPoint, ...]
    memory: tuple[MemoryCase, ...]

    @staticmethod
    def of_results(results: Path) -> Measurements:
        """What a folder of results files says."""
        speed = [
            point
            for path in sorted(results.glob("*.json"))
            for point in _speed_points(path.name, json.loads(path.read_text()))
        ]
        file = results / MEMORY_FILE
        rows = json.loads(file.read_text())["rows"] if file.is_file() else []
        names = MemoryCase.__dataclass_fields__
        return Measurements(
            tuple(speed), tuple(MemoryCase(**{name: row[name] for name in names}) for row in rows)
        )

    @staticmethod
    def packaged() -> Measurements:
        """What lies in the package."""
        data = json.loads(MEASUREMENTS.read_text())
        return Measurements(
            tuple(SpeedPoint(**point) for point in data["speed"]),
            tuple(MemoryCase(**case) for case in data["memory"]),
        )

    def as_json(self) -> str:
        """The content of `measurements.json`: one measurement per line."""
        lists = [
            f' "{name}": [\n' + ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows) + "\n ]"
            for name, rows in (("speed", self.speed), ("memory", self.memory))
        ]
        return "{\n" + ",\n".join(lists) + "\n}\n"

    def utilisation(
        self, model: BaseModelConfig, context_length: int, *, preference: bool = False
    ) -> Utilisation | None:
        """Utilisation at a length out of every run of the same kind and size of model, or None."""
        shape = {**model.sizes, "attention": model.attention}
        alike = [
            point
            for point in self.speed
            if point.preference == preference
            and all(getattr(point, name) == shape[name] for name in _ALIKE)
        ]
        if not alike:
            return None
        by_length: dict[int, list[float]] = {}
        for point in alike:
            by_length.setdefault(point.context_length_tokens, []).append(point.share)
        lengths = sorted(by_length)
        shares = [statistics.fmean(by_length[length]) for length in lengths]
        source = ", ".join(dict.fromkeys(point.file for point in alike))
        if not lengths[0] <= context_length <= lengths[-1]:
            nearest = lengths[0] if context_length < lengths[0] else lengths[-1]
            source += f", at {nearest} tokens: the nearest length measured"
        return Utilisation(_interpolate(context_length, lengths, shares), source)

    def overhead(self) -> Overhead:
        """Medians over the measured cases, or the assumption."""
        if not self.memory:
            return Overhead(ASSUMED_CONTEXT_BYTES, ASSUMED_SLACK_SHARE, "assumed, not measured")
        return Overhead(
            int(statistics.median(case.context_bytes for case in self.memory)),
            statistics.median(
                case.measured_reserved_bytes / case.measured_peak_bytes - 1 for case in self.memory
            ),
            f"median of {len(self.memory)} cases in {MEMORY_FILE}",
        )

    def memory_bytes(self, device_name: str) -> int | None:
        """Memory of this type of GPU as its driver showed it, if a measurement recorded it."""
        found = (c.device_memory_bytes for c in self.memory if c.device_name == device_name)
        return next(found, None)


def _speed_points(file: str, data: dict[str, Any]) -> Iterator[SpeedPoint]:
    """The rows of a results file that trained a model whose shape the file knows."""
    config = data.get("config") or {}
    for row in data.get("rows", ()):
        trained = row.get("model") or config.get("model")
        if row.get("mfu") and isinstance(trained, dict):
            shape = {**trained, **trained.get("shape", {})}
            factor = RECOMPUTED if trained["gradient_checkpointing"] else 1.0
            yield SpeedPoint(
                file,
                config.get("preference") is not None,
                **{name: shape[name] for name in _ALIKE},
                context_length_tokens=row["context_length_tokens"],
                share=row["mfu"] * factor,
            )


def _interpolate(length: int, lengths: list[int], shares: list[float]) -> float:
    if length <= lengths[0]:
        return shares[0]
    for i in range(1, len(lengths)):
        if length <= lengths[i]:
            low, high = math.log(lengths[i - 1]), math.log(lengths[i])
            at = (math.log(length) - low) / (high - low)
            return shares[i - 1] + at * (shares[i] - shares[i - 1])
    return shares[-1]
