"""The benchmark of a training step trains the same weights on every side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    "lengths=[128]",
    "tokens_per_batch=256",
    "preset=mla_tiny",
    "vocab_size=384",
    "steps=2",
    "warmup=1",
    *("attention=torch", "norm=torch", "rope=torch", "compile=false", "fp8_keep_layers=[]"),
)


def measured(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], side: str
) -> dict[str, Any]:
    assert ic("benchmark", "training", *SMALL, f"side={side}") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_the_sides_compute_the_same(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao", reason="pip install '.[fp8]'")
    rows = {side: measured(ic, capsys, side) for side in ("ours", "fp8 rowwise", "transformers")}
    ours = rows["ours"]
    assert ours["n"] == 2
    assert ours["tokens_per_s"] == pytest.approx(256 / ours["step_median_s"], rel=1e-2)
    for name in ("first_loss", "last_loss"):
        assert rows["transformers"][name] == pytest.approx(ours[name], rel=1e-5)
        assert rows["fp8 rowwise"][name] == pytest.approx(ours[name], rel=2e-2)
        assert rows["fp8 rowwise"][name] != ours[name]
    assert ours["last_loss"] < ours["first_loss"]


@pytest.mark.slow
def test_a_side_that_fails_gets_a_row(
    ic: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    output = tmp_path / "out.json"
    refused = ("sides=[ours,fp8 rowwise]", "fp8_keep_layers=[0,1,2]", f"output={output}")
    assert ic("benchmark", "training", *SMALL, *refused) == 1
    good, bad = json.loads(output.read_text())["rows"]
    assert good["side"] == "ours"
    assert good["n"] == 2
    assert bad["side"] == "fp8 rowwise"
    assert "model.fp8: no layer would multiply in FP8" in bad["error"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokens_per_batch=5000", "tokens_per_batch=5000: must be a multiple of each of lengths"),
        ("sides=[fp9]", "sides='fp9': "),
        ("output=out", "output='out': must end in .json"),
    ],
)
def test_refusals(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert ic("benchmark", "training", override) == 2
    assert message in capsys.readouterr().err
