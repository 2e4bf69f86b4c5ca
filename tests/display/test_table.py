"""Tables within the width of a terminal, nothing cut off."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ic.display.table import print_table
from ic.evaluation.by_depth_tables import terminal_table
from ic.kernels.benchmark_report import print_table as print_benchmark
from ic.studies.ablation.report import show_ablation
from ic.studies.scaling.report import show_scaling

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"


def published(name: str) -> list[dict]:
    return list(json.loads((RESULTS / name).read_text())["rows"])


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80)


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    return lines


def test_columns_that_do_not_fit_stand_below_and_none_is_lost() -> None:
    heads = ["what", *(f"column {n}" for n in range(12))]
    rows = [[name, *(f"{name}{n}" for n in range(12))] for name in ("first", "second")]
    console = terminal()
    print_table(heads, rows, title="t", caption="c", console=console)
    lines = lines_of(console)
    shown = [line for line in lines if line.strip().startswith("first")]
    assert len(shown) > 1
    assert [cell for line in shown for cell in line.split() if cell != "first"] == rows[0][1:]
    assert sum(line.strip() == "t" for line in lines) == 1
    assert sum(line.strip() == "c" for line in lines) == 1
    wide = Console(file=io.StringIO(), width=200)
    print_table(heads, rows, title="t", console=wide)
    assert isinstance(wide.file, io.StringIO)
    assert sum("first" in line for line in wide.file.getvalue().splitlines()) == 1


def test_scaling_fits() -> None:
    rows = published("scaling.json")
    console = terminal()
    show_scaling(rows, "ddp", console)
    text = " ".join(lines_of(console))
    for row in rows:
        if row["status"] == "measured":
            assert f"{row['tokens_per_s']:,.0f}" in text
            assert f"{row['step_time_p10_s']:.3f}-{row['step_time_p90_s']:.3f}" in text


def test_ablation_fits() -> None:
    console = terminal()
    show_ablation(published("ablation.json"), None, console)
    assert "no curriculum" in " ".join(lines_of(console))


@pytest.mark.parametrize("name", ["mla_tiny-fit.json", "infinitecontext_1b-passkey.json"])
def test_passkeys_fit(name: str) -> None:
    rows = [row for row in published(name) if row["what"] == "passkey"]
    console = terminal()
    console.print(terminal_table(rows, title="passkeys"))
    lines = lines_of(console)
    for length in {row["length_tokens"] for row in rows}:
        assert sum(f" {length:,} " in line for line in lines) == len({row["task"] for row in rows})
    # No row is broken into two: all that is shown begins with a task.
    shown = [line.split()[0] for line in lines[4:-2] if line.strip()]
    assert {*shown} <= {"single", "multi_key"}, lines


def test_the_widest_passkey_row_fits() -> None:
    """A hundred questions a depth, all the way down; the depth does not read as an accuracy."""
    base = {"task": "multi_key", "length_tokens": 2**20, "n": 100}
    rows = [{**base, "depth": depth, "correct": 100} for depth in (0.0, 0.125)]
    rows += [{**base, "depth": 1.0, "correct": 99}, {**base, "depth": "control", "correct": 0}]
    console = terminal()
    console.print(terminal_table(rows, title="passkeys"))
    (line,) = (line for line in lines_of(console) if "multi_key" in line)
    shown = "multi_key 1,048,576 299/300 99.7 98-100 99/100, depth 100 % 0/100"
    assert " ".join(line.split()) == shown


def test_kernels_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = json.loads((RESULTS / "kernels-decode.json").read_text())
    print_benchmark(run, run["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    timed = [row for row in run["rows"] if "median_us" in row]
    assert f"{timed[0]['median_us']:.1f}" in " ".join(lines)
