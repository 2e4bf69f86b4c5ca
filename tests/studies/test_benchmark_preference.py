"""The benchmark against TRL's trainer runs both sides on the same pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ic.studies.benchmark_preference_options import SIDES

pytest.importorskip("trl")


@pytest.mark.slow
def test_measures_every_side_in_a_process_of_its_own(
    ic: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    output = tmp_path / "out.json"
    small = ("lengths=[512]", "preset=mla_tiny", "vocab_size=384", "steps=2", "warmup=1")
    assert ic("benchmark", "preference", *small, f"output={output}") == 0
    written = json.loads(output.read_text())
    for row, side in zip(written["rows"], SIDES, strict=True):
        assert row["side"] == side
        assert row["n"] == 2
        assert row["tokens_per_s"] == pytest.approx(2 * 512 / row["step_median_s"], rel=1e-2)


def test_refuses_fewer_rows_than_bytes(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic("benchmark_preference", "vocab_size=256") == 2
    assert "vocab_size=256: must be at least 320" in capsys.readouterr().err
