"""What is said before and while a suite is evaluated."""

from __future__ import annotations

import io
import sys
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from ic.evaluation.live_table import LiveTable
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.suite import PasskeySuite
from ic.evaluation.progress import TimeLeft, suite_progress


def cell(length: int, samples: int, depth: float = 0.5) -> Cell:
    return Cell("single", length, depth, "noise", samples)


def row(seconds: float, index: int = 0) -> dict[str, Any]:
    answer = {"expected": ["1"], "text": "1", "correct": True}
    return {"model": "a", "settings": "b", "index": index, **answer, "seconds": seconds}


def answer(left: TimeLeft, cell: Cell, seconds: float) -> None:
    """All samples of a cell."""
    for index in range(cell.samples):
        left.add(cell, row(seconds / cell.samples, index))


def test_the_estimate_follows_the_growth_that_was_measured() -> None:
    """Four times the time at twice the length: the next doubling costs four times as much again."""
    left = TimeLeft([cell(512, 10), cell(1024, 10), cell(1024, 5, 1.0), cell(2048, 2)])
    assert str(left) == ""
    answer(left, cell(512, 10), 10.0)
    # Nothing is known of the growth: it is proportional to the length at the least.
    assert str(left) == f"at least {clock(15 * 2 + 2 * 4)} left"
    answer(left, cell(1024, 10), 40.0)
    assert str(left) == f"about {clock(5 * 4 + 2 * 16)} left"
    answer(left, cell(1024, 5, 1.0), 20.0)
    assert str(left) == f"about {clock(2 * 16)} left"
    left.add(cell(2048, 2), row(15.0))
    assert str(left) == f"about {clock(15)} left"
    left.add(cell(2048, 2), row(15.0))
    assert str(left) == ""


def clock(seconds: float) -> str:
    return f"0:{int(seconds) // 60:02}:{int(seconds) % 60:02}"


def test_the_estimate_has_bounds() -> None:
    """Noise in short cells is no law: between once and twice the power of the length."""
    for seconds, expected in ((5.0, 5.0 * 2), (100.0, 100.0 * 4)):
        left = TimeLeft([cell(512, 1), cell(1024, 1), cell(2048, 1)])
        left.add(cell(512, 1), row(10.0))
        left.add(cell(1024, 1), row(seconds))
        assert str(left) == f"about {clock(expected)} left"


def test_processes_share_the_rest() -> None:
    left = TimeLeft([cell(512, 1), cell(512, 8, 1.0)], processes=4)
    left.add(cell(512, 1), row(10.0))
    assert str(left) == "about 0:00:20 left"


def test_it_is_said_before_the_first_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = PasskeyGridConfig(lengths=[512, 1024], depths=[0.5], samples=3, control_samples=1)
    suite = PasskeySuite(grid)
    with suite_progress(suite) as on_sample:
        assert capsys.readouterr().out == "passkey: 8 cells, 16 prompts of 512 to 1,024 tokens\n"
        first, *_ = suite.cells()
        on_sample(first, {**asdict(first), **row(2.0, 0)})
        on_sample(first, {**asdict(first), **row(2.0, 1)})
        assert capsys.readouterr().out == ""  # a line per cell
        on_sample(first, {**asdict(first), **row(2.0, 2)})
        (line,) = capsys.readouterr().out.splitlines()
        assert line.endswith("depth 0.5: 3/3 in 6.0 s, at least 0:00:42 left")
    monkeypatch.setattr(suite, "progress_text", lambda row: f"{row['n']} texts")
    with suite_progress(suite) as on_sample:
        for index in range(3):
            on_sample(first, {**asdict(first), **row(2.0, index)})
    assert ": 3 texts in 6.0 s" in capsys.readouterr().out
    with suite_progress(suite) as on_sample:
        for index in range(3):
            on_sample(first, {**asdict(first), **row(2.0, index)}, index < 2)
    assert ": 3 texts in 2.0 s for 1, 2 answered before, " in capsys.readouterr().out
    with suite_progress(suite) as on_sample:
        for index in range(3):
            on_sample(first, {**asdict(first), **row(2.0, index)}, True)
    assert capsys.readouterr().out.endswith(": 3 texts, answered before\n")
    with suite_progress(suite, quiet=True):
        pass
    assert capsys.readouterr().out == ""


def test_lines_are_flushed_as_they_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log file shows where a long evaluation is, not where its last full buffer was."""

    class Log(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    log = Log()
    monkeypatch.setattr(sys, "stdout", log)
    suite = PasskeySuite(PasskeyGridConfig(lengths=[512], depths=[0.5], samples=3))
    with suite_progress(suite) as on_sample:
        assert log.flushed.startswith("passkey: ")
        first, *_ = suite.cells()
        for index in range(3):
            on_sample(first, {**asdict(first), **row(2.0, index)})
        assert "3/3 in 6.0 s" in log.flushed


def test_a_terminal_shows_a_table_that_fills_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = PasskeyGridConfig(lengths=[512, 1024], depths=[0.5], fillers=["noise"], samples=4)
    suite = PasskeySuite(grid)
    table = LiveTable(suite)
    short, control, *_ = suite.cells()
    for cell, index, correct in ((short, 0, 1), (short, 1, 0), (short, 2, None), (control, 0, 0)):
        table.add(cell, {**asdict(cell), **row(1.0, index), "correct": correct})
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    # Of three answers two have a score; the control of 512 tokens counts no more.
    assert any("512" in line and "1k" in line for line in lines)
    assert any("single" in line and "50 % 3/4" in line and "0/8" in line for line in lines)

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with suite_progress(suite) as on_sample:
        for index in range(4):
            on_sample(short, {**asdict(short), **row(2.0, index)})
    shown = capsys.readouterr().out
    assert "100 % 4/8" in shown
    assert "4/16" in shown
    assert "0:00:" in shown  # the time left
