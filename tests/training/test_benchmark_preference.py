"""The benchmark against TRL's trainer runs both sides on the same pairs."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from ic.training import benchmark_preference as benchmark

pytest.importorskip("trl")


def test_measures_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Namespace, length: int, side: str) -> dict[str, object]:
        """In this process: a new one would spend its time on imports."""
        row = benchmark._measure(Namespace(**{**vars(args), "lengths": [length], "side": side}))
        return {"side": side, "length_tokens": length, **row}

    monkeypatch.setattr(benchmark, "_run", run)
    output = tmp_path / "out.json"
    options = [
        "--lengths", "512", "--model", "mla_tiny", "--vocab-size", "384", "--steps", "2",
        "--warmup", "1",
    ]  # fmt: skip
    assert benchmark.main([*options, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["command"].startswith("python -m ic.training.benchmark_preference --lengths 512")
    sides = ("ours", "ours, prompt twice", "trl")
    for row, side in zip(written["rows"], sides, strict=True):
        assert row["side"] == side
        assert row["n"] == 2
        assert row["tokens_per_s"] == pytest.approx(2 * 512 / row["step_median_s"], rel=1e-2)


def test_refuses_fewer_rows_than_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--vocab-size", "256"])
    assert ended.value.code == 2
    assert "--vocab-size 256: at least 320" in capsys.readouterr().err
