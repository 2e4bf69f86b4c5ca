"""What `plan` takes from measured runs: from the package, the same as docs/results says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ic.config.model import ModelConfig
from ic.planning.measurements import (
    ASSUMED_CONTEXT_BYTES,
    ASSUMED_SLACK_SHARE,
    MEASUREMENTS,
    Measurements,
    MemoryCase,
)

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "attention": "torch",
    "gradient_checkpointing": False,
}


def write(folder: Path, name: str, rows: list[dict[str, object]], **config: object) -> None:
    (folder / name).write_text(json.dumps({"config": config, "rows": rows}))


def memory_row(reserved: int, context: int, name: str = "NVIDIA H200") -> dict[str, object]:
    case = MemoryCase(name, 150_000, context, 1000, reserved)
    return {"case": "one", "error_share": 0.01, **dataclasses.asdict(case)}


def test_the_package_holds_what_the_results_say() -> None:
    assert MEASUREMENTS.read_text() == Measurements.of_results(RESULTS).as_json(), "run make tables"


def test_what_is_packaged_reads_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, "plan-memory.json", [memory_row(1100, 7)])
    row = {"context_length_tokens": 4096, "mfu": 0.3}
    write(tmp_path, "a-fit.json", [row], model=SHAPE)
    found = Measurements.of_results(tmp_path)
    assert (len(found.speed), len(found.memory)) == (1, 1)
    data = json.loads(found.as_json())
    assert data["memory"] == [
        {
            "device_name": "NVIDIA H200",
            "device_memory_bytes": 150_000,
            "context_bytes": 7,
            "measured_peak_bytes": 1000,
            "measured_reserved_bytes": 1100,
        }
    ]
    assert data["speed"][0]["file"] == "a-fit.json"
    assert Measurements.packaged() == Measurements.of_results(RESULTS)


def test_overhead_is_assumed_without_the_memory_file_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, "plan-scaling.json", [{"case": "one", "error_share": 0.01}])
    found = Measurements.of_results(tmp_path)
    overhead = found.overhead()
    assert overhead.source == "assumed, not measured"
    assert (overhead.context_bytes, overhead.slack_share) == (
        ASSUMED_CONTEXT_BYTES,
        ASSUMED_SLACK_SHARE,
    )
    assert found.memory_bytes("NVIDIA H200") is None


def test_overhead_is_the_median_of_the_cases(tmp_path: Path) -> None:
    rows = [memory_row(1300, 30), memory_row(1020, 10), memory_row(1100, 50, "NVIDIA L40S")]
    write(tmp_path, "plan-memory.json", rows)
    found = Measurements.of_results(tmp_path)
    overhead = found.overhead()
    assert overhead.context_bytes == 30
    assert overhead.slack_share == pytest.approx(0.1)
    assert overhead.source == "median of 3 cases in plan-memory.json"
    assert found.memory_bytes("NVIDIA L40S") == 150_000
    assert found.memory_bytes("NVIDIA B200") is None


def test_utilisation_between_lengths_and_beyond_them(tmp_path: Path) -> None:
    """Means of a length; linear over the logarithm; recomputed work counts as work."""
    rows = [{"context_length_tokens": n, "mfu": mfu} for n, mfu in ((1024, 0.2), (16384, 0.4))]
    write(tmp_path, "a-fit.json", rows, model=SHAPE)
    again = {"context_length_tokens": 1024, "mfu": 0.3}
    write(tmp_path, "b-fit.json", [again], model={**SHAPE, "gradient_checkpointing": True})
    write(tmp_path, "small-fit.json", rows, model={**SHAPE, "hidden_size": 64})
    found = Measurements.of_results(tmp_path)

    def at(length: int) -> tuple[float, str]:
        used = found.utilisation(ModelConfig(), length)
        assert used is not None
        return used.share, used.source

    share, source = at(1024)
    assert (share, source) == (pytest.approx((0.2 + 0.3 * 4 / 3) / 2), "a-fit.json, b-fit.json")
    assert at(4096)[0] == pytest.approx((0.3 + 0.4) / 2)
    assert at(131072) == (
        pytest.approx(0.4),
        "a-fit.json, b-fit.json, at 16384 tokens: the nearest length measured",
    )
    assert found.utilisation(ModelConfig(num_hidden_layers=8), 1024) is None
