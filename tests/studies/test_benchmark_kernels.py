"""The benchmark's bookkeeping, and the documented table against the results file it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ic.kernels.benchmark_mla import add_baselines, failure, relative_error, selected_cases
from ic.kernels.benchmark_registry import cases_of, load_kernels, register
from ic.kernels.benchmark_report import markdown_table, print_table

ROOT = Path(__file__).parents[2]


def test_every_registered_case_is_complete() -> None:
    for kernel in load_kernels():
        names = [case.name for case in cases_of(kernel)]
        assert len(names) == len(set(names))
        for case in cases_of(kernel):
            assert case.kernel == kernel
            assert case.bytes_moved > 0
            assert 0 < case.tolerance <= 5e-2
            assert case.baseline is None or case.baseline in names


def test_unknown_and_double_kernels_are_refused() -> None:
    load_kernels()
    with pytest.raises(ValueError, match="known are"):
        cases_of("nonsense")
    with pytest.raises(ValueError, match="twice"):
        register("mla_decode")(list)


def test_cases_are_selected_by_kernel_and_name() -> None:
    names = [case.name for case in selected_cases(["mla_decode"], "192+64")]
    assert "(1, 1M) 16 h 192+64 bf16" in names
    assert all("192+64" in name for name in names)
    with pytest.raises(ValueError, match="match='nonsense': no case of mla_decode contains it"):
        selected_cases(["mla_decode"], "nonsense")


def test_nan_is_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(2)) == 0


def test_rows_are_not_compared_with_all_rows() -> None:
    out = torch.randn(2, 1, 3)
    assert relative_error(out[:1], out[0]) == 0
    with pytest.raises(ValueError, match=r"shape \(2, 1, 3\); the reference has \(2, 3\)"):
        relative_error(out, out[:, 0])


def test_baseline_ratio() -> None:
    case = next(case for case in cases_of("mla_decode") if case.baseline)
    rows = [
        {"case": case.baseline, "by": "ours", "n": 1, "median_us": 30.0},
        {"case": case.name, "by": "ours", "n": 1, "median_us": 10.0},
    ]
    add_baselines(rows, [case])
    assert rows[1]["times_baseline_speed"] == 3.0


@pytest.mark.parametrize("name", ["kernels-decode", "kernels-decode-h200"])
def test_documented_table_is_current(name: str) -> None:
    run = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    assert markdown_table(run, run["rows"]) in (ROOT / "docs/kernels.md").read_text()


@pytest.mark.parametrize("kernel", ["attention", "rmsnorm", "rope"])
def test_documented_training_tables_are_current(kernel: str) -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    run = json.loads((ROOT / f"docs/results/kernels-training-{kernel}.json").read_text())
    ours = [row for row in run["rows"] if row["by"] == "ours" and "median_us" in row]
    assert ours
    for row in ours:
        if kernel == "attention":
            speed = f"{row['tflop_per_s']:.0f}"
            line = f"| {row['case']} | {row['median_us'] / 1e3:.2f} | {speed} |"
        else:
            name = {"rmsnorm": "RMSNorm", "rope": "RoPE"}[kernel]
            speed = f"{row['gb_per_s'] / 1e3:.2f}"
            line = f"| {name} {row['case']} | {row['median_us']:.1f} | {speed} |"
        assert line in text


def test_failure_is_one_line() -> None:
    assert failure(RuntimeError("bad stride\nlong trace")) == "failed: RuntimeError: bad stride"


def test_missing_peers_stand_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    ceilings = {"copy_tb_per_s": 3.0, "matmul_bf16_tflop_per_s": 700.0}
    rows = [
        {"kernel": "rope", "case": "small", "by": "Liger", "reason": "not installed: no module"},
        {"kernel": "rope", "case": "small", "by": "compile", "reason": "failed: RuntimeError: x"},
    ]
    print_table({"device": "gpu", "config": {"ceilings": ceilings}}, rows)
    out = capsys.readouterr().out
    assert "not installed: Liger" in out
    assert "failed: RuntimeError: x" in out
    assert "no module" not in out
