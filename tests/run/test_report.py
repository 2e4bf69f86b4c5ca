"""The report of a run: what it shows, that it stands alone, and that it costs no run its results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ic.cli import main
from ic.files.json_lines import append_row
from ic.files.run_folder import RunFolder
from ic.run.report.curves import as_svg, draw_curves
from ic.verbs.report import Config
from tests.conftest import SHORT

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
FEW = (
    *SHORT,
    "report=true",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "evaluation.lengths=[256]",
    "evaluation.depths=[0.5]",
    "evaluation.samples=1",
)
SAMPLES = (
    "callbacks.samples={every_n_validations: 1, max_new_tokens: 4, "
    "prompts: ['<script>alert(1)</script> & ']}"
)


class Page(HTMLParser):
    """What a browser makes of a page: its elements, addresses and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.meta: dict[str, str] = {}
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.headings: list[str] = []
        self.texts: list[str] = []
        self._label = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append(tag)
        self.addresses += [
            value for name, value in given.items() if name in ("src", "href", "data", "xlink:href")
        ]
        self.meta |= {given["http-equiv"]: given["content"]} if "http-equiv" in given else {}
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag: str) -> None:
        if "svg" not in self.open or tag == "svg":
            assert self.open.pop() == tag
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        if tag in ("th", "td"):
            self.cells[-1].append(data)
        elif tag == "dt":
            self._label = data
        elif tag == "dd":
            self.facts[self._label] = data
        elif tag == "h2":
            self.headings.append(data)
        elif tag == "pre":
            self.texts.append(data)

    def row(self, first: str) -> list[str]:
        return next(row for row in self.cells if row and row[0] == first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, which wrote its report."""
    folder, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit) as end:
            main([*FEW, SAMPLES])
    finally:
        os.chdir(before)
    assert not end.value.code
    return folder / "runs/debug/default"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy of it in `runs/debug/default`, to be changed."""
    shutil.copytree(finished, tmp_path / "runs/debug/default", symlinks=True)
    return RunFolder(tmp_path / "runs/debug/default")


@pytest.mark.slow
def test_a_run_leaves_a_page_of_all_it_measured(finished: Path) -> None:
    run, page = RunFolder(finished), Page(finished / "report.html")
    found = json.loads(run.results.read_text())
    throughput = json.loads(run.throughput.read_text())
    memory = json.loads(run.memory().read_text())
    assert page.facts["status"] == found["status"] == "finished"
    assert page.facts["optimizer steps"] == "4 of 4"
    assert page.facts["commit"] == found["commit"]
    longest = max(row["context_length_tokens"] for row in throughput["by_context_length"])
    assert page.facts["longest training text"] == f"{longest:,} tokens"
    assert page.facts["bf16 cache per token"] == "480 bytes"  # 3 layers x (64 + 16) x 2 bytes
    rows = [line.split(",") for line in run.metrics.read_text().splitlines()]
    losses = [row[rows[0].index("train/loss")] for row in rows[1:]]
    last = [loss for loss in losses if loss][-1]
    assert page.facts["last training loss"] == f"{float(last):.4f} (step 4)"
    assert page.headings[:2] == ["Curves", "Evaluation: passkey retrieval on synthetic text"]
    assert {"Throughput", "Memory", "Environment", "Configuration"} < set(page.headings)
    assert page.row("all")[1] == str(throughput["num_steps"])
    peak = memory["phases"]["backward"]["split_of_bytes"]
    assert page.row("backward")[1] == f"{peak / 2**20:,.1f}"
    assert page.row("torch")[1] == found["versions"]["torch"]
    assert page.row("command")[1] == found["command"]
    assert run.config.read_text() in "".join(page.texts)
    measured = [row for row in found["rows"] if row["what"] == "passkey"]
    asked = [row for row in measured if row["depth"] != "control"]
    share = f"{sum(row['correct'] for row in asked)}/{sum(row['n'] for row in asked)}"
    assert any(share in row for row in page.cells)
    assert (
        "Without a needle every answer should be wrong." in (finished / "report.html").read_text()
    )
    assert run.curves.read_bytes().startswith(b"\x89PNG")


def test_it_stands_alone_and_runs_nothing(finished: Path) -> None:
    page = Page(finished / "report.html")
    assert "script" not in page.elements
    assert not {"link", "iframe", "object", "form"} & set(page.elements)
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert len(pictures) == 2  # heatmap and memory
    assert all(address.startswith("data:image/png;base64,") for address in pictures)
    assert page.meta["Content-Security-Policy"].startswith("default-src 'none'")
    text = (finished / "report.html").read_text()
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    # What the model was asked to go on with stands there as text.
    assert any(text.startswith("step 4: <script>alert(1)</script> & |") for text in page.texts)


def test_it_is_made_again_and_shows_what_was_evaluated_since(
    ic: Run, run: RunFolder, capsys: Capture
) -> None:
    one = ("evaluation.lengths=[300]", "evaluation.depths=[0.5]", "evaluation.samples=1")
    assert ic("evaluate", f"run={run.path}", *one) == 0
    run.report.unlink()
    assert ic("report", str(run.path)) == 0
    assert f"report: {run.report}" in capsys.readouterr().out
    page = Page(run.report)
    assert "Step 4 evaluated: passkey retrieval on synthetic text" in page.headings
    assert any("300" in row for row in page.cells)
    assert len([a for a in page.addresses if a.startswith("data:")]) == 3
    before = run.report.read_bytes()
    assert ic("report", f"run={run.path}", "output=elsewhere/page.html") == 0
    assert (run.path.parents[2] / "elsewhere/page.html").read_bytes() == before


def test_of_a_run_that_has_not_ended(ic: Run, run: RunFolder) -> None:
    """Configuration and metrics are all there is while a run trains."""
    for path in (run.results, run.throughput, run.memory(), run.last, run.best, run.samples):
        path.unlink()
    shutil.rmtree(run.suite("passkey").path)
    assert ic("report", f"run={run.path}") == 0
    page = Page(run.report)
    assert page.facts["status"].startswith("it has not ended")
    assert page.headings == ["Curves", "Configuration"]


def test_how_long_it_trained_and_on_what(ic: Run, run: RunFolder) -> None:
    """On a CPU there are no GPU hours; numbers have their thousands set apart, a seed has not."""
    assert not {"GPUs", "GPU hours"} & Page(run.report).facts.keys()
    throughput = json.loads(run.throughput.read_text())
    timed = {"num_steps": 2600, "num_steps_timed": 2000, "tokens_timed": 3_600_000}
    on = {
        "tokens_per_s": 500.0,
        "num_devices": 8,
        "device": "NVIDIA H100",
        "tokens_seen": 4_680_000,
    }
    run.throughput.write_text(json.dumps({**throughput, **timed, **on}))
    results = json.loads(run.results.read_text())
    row = {"what": "some_text", "documents": 1234567, "bytes": 98765.4, "seed": 12345, "loss": 1.5}
    run.results.write_text(json.dumps({**results, "rows": [*results["rows"], row]}))
    assert ic("report", f"run={run.path}") == 0
    page = Page(run.report)
    assert page.facts["training time"] == "2:00:00 in 2,000 of 2,600 steps"
    assert page.facts["GPUs"] == "8 x NVIDIA H100"
    assert page.facts["GPU hours"] == "16.00 in 2,000 of 2,600 steps"
    assert page.facts["tokens seen"] == "4,680,000"
    assert page.row("1,234,567") == ["1,234,567", "98,765", "12345", "1.5"]


def test_warnings_stand_at_the_top(ic: Run, run: RunFolder) -> None:
    results = json.loads(run.results.read_text())
    changed = {**results, "commit": "abc+changes", "status": "evaluation incomplete"}
    run.results.write_text(json.dumps(changed))
    append_row(run.guardrails, {"global_step": 3, "reason": "loss"})
    assert ic("report", f"run={run.path}") == 0
    assert Page(run.report).facts["status"] == "evaluation incomplete"
    head = run.report.read_text().partition("</header>")[0]
    assert "The code differed from its commit" in head
    assert "The guardrails skipped 1 steps" in head


def test_bad_input_is_one_line_and_leaves_the_page(
    ic: Run, run: RunFolder, capsys: Capture, tmp_path: Path
) -> None:
    before = run.report.read_bytes()
    (tmp_path / "empty").mkdir()
    assert ic("report", "run=empty") == 2
    assert "run=empty: no run has written empty/config.yaml; give a run's folder" in _error(capsys)
    assert ic("report", f"run={run.path}", "output=empty") == 2
    assert "output=empty: is a folder; give a file such as report.html" in _error(capsys)
    run.results.write_text('{"status": "fin')
    assert ic("report", f"run={run.path}") == 2
    assert f"{run.results} is no JSON" in _error(capsys)
    assert run.report.read_bytes() == before
    with pytest.raises(ValueError, match="is a folder"):
        Config(run="x", output=str(tmp_path))


def test_a_report_that_cannot_be_written_ends_no_run(ic: Run, run: RunFolder) -> None:
    run.report.unlink()
    run.report.mkdir()  # nothing can take its place
    more = ("trainer.max_steps=5", "ckpt_path=last", "allow_config_change=true", "overwrite=false")
    with pytest.warns(UserWarning, match="no report is written: .*report.html"):
        assert ic(*FEW, SAMPLES, *more) == 0
    assert json.loads(run.results.read_text())["status"] == "finished"
    assert json.loads(run.throughput.read_text())["last_step"] == 5


def test_results_come_last(
    ic: Run, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that is killed before they are there ends again, and so makes its report again; one
    that begins anew takes the old report away.
    """
    there: list[bool] = []

    def seen(folder: RunFolder, results: Any) -> Path:
        there.append(folder.results.exists() or folder.report.exists())
        return folder.report

    monkeypatch.setattr("ic.run.report.page.write_report", seen)
    assert ic(*FEW, "callbacks.passkey=null", "overwrite=true") == 0
    assert there == [False]


def _error(capsys: Capture) -> str:
    return capsys.readouterr().err.splitlines()[-1]


ROWS: list[dict[str, Any]] = [
    {"step": "0", "train/loss": "6", "lr": "0.1", "train/context_length": "128.0"},
    {"step": "9", "train/loss": "5", "lr": "0.2", "train/context_length": "256.0"},
    {"step": "9", "val/loss": "5.5", "val/perplexity": "9"},
    {"step": "19", "val/loss": "4.5"},
]


def test_curves_show_what_was_logged() -> None:
    figure = draw_curves(ROWS)
    assert figure is not None
    shown = {
        axis.get_title(loc="left"): {
            str(line.get_label()): [tuple(map(float, point)) for point in line.get_xydata()]  # type: ignore[union-attr]
            for line in axis.lines
        }
        for axis in figure.axes
    }
    assert shown == {
        "loss": {"training": [(1, 6), (10, 5)], "validation": [(10, 5.5), (20, 4.5)]},
        "context length in tokens": {"training": [(1, 128), (10, 256)]},
        "learning rate": {"training": [(1, 0.1), (10, 0.2)]},
    }  # perplexity has one point, which is no curve
    assert draw_curves(ROWS[:1]) is None


def test_large_numbers_of_an_axis_have_their_thousands_set_apart() -> None:
    rows = [{"step": str(n), "train/tokens_per_s": str(n)} for n in (0, 24_000)]
    figure = draw_curves(rows)
    assert figure is not None
    texts = {"".join(each.itertext()) for each in ElementTree.fromstring(as_svg(figure)).iter()}
    assert {"20,000", "5,000"} <= texts
    assert not {"20000", "5000"} & texts


def test_curves_take_the_colour_of_the_page() -> None:
    figure = draw_curves(ROWS)
    assert figure is not None
    svg = as_svg(figure)
    assert svg == as_svg(figure)
    root = ElementTree.fromstring(svg)
    texts = [each for each in root.iter() if each.tag.endswith("}text")]
    assert {"loss", "optimizer step", "training"} <= {"".join(each.itertext()) for each in texts}
    assert all("currentColor" in each.get("style", "") for each in texts)
    assert "#0a0b0c" not in svg
    assert "#000000" not in svg
    assert "#ffffff" not in svg
