"""`fit` with suites of its own choice: at its end, cheap ones while it trains, refused in time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ic.files.json_lines import read_rows
from tests.conftest import SHORT

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
CHOSEN = (
    *SHORT,
    "trainer.max_steps=2",
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "callbacks.context_length=null",
    "suite=perplexity",
    "suite.perplexity.files=[books.txt]",
    "suite.perplexity.lengths=[256]",
    "suite.perplexity.samples=2",
    "suite.perplexity.tasks=[full]",
)


def test_fit_evaluates_the_suites_that_were_chosen(
    ic: Run, capsys: Capture, tmp_path: Path
) -> None:
    books = "".join(f"Chapter {chapter}. It was late, and nobody came. " for chapter in range(60))
    (tmp_path / "books.txt").write_text(books)
    when = "callbacks.suites={every_n_steps: 1, cheap_lengths: [128], cheap_samples: 1}"
    args = (*CHOSEN, "suite.perplexity.document_unit=paragraph", "suite.perplexity.samples=1")
    assert ic(*args, when) == 0
    run = tmp_path / "runs/debug/default"
    rows = read_rows(run / "perplexity/samples.jsonl")
    assert [(row["task"], row["length_tokens"], row["index"]) for row in rows] == [("full", 256, 0)]
    assert len(read_rows(run / "perplexity/samples-step=1.jsonl")) == 1
    found = json.loads((run / "results.json").read_text())
    assert "perplexity" in {row["what"] for row in found["rows"]}
    assert not (run / "passkey").exists()
    # A run that is continued from its folder still has the options, each of its type.
    saved = yaml.safe_load((run / "config.yaml").read_text())["suite"]
    assert saved["perplexity"]["lengths"] == [256]
    capsys.readouterr()
    for given in (("run=runs/debug/default",), ("from=runs/debug/default", "run_id=b")):
        assert ic("fit", *given, "suite.perplexity.samples=2", "--print_config") == 0
        shown = yaml.safe_load(capsys.readouterr().out)["suite"]
        assert shown == {"perplexity": {**saved["perplexity"], "samples": 2}}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("suite=[passkey,perplexity]",),
            "suite=passkey: a run asks passkeys with callbacks.passkey",
        ),
        (("callbacks.suites=null",), "suite=['perplexity']: callbacks.suites=null evaluates none"),
        (("suite.perplexity.lengths=[8192]",), "8,192 tokens, but 2 samples"),
        (("suite.perplexity.sample=2",), "unknown key 'suite.perplexity.sample'; did you mean"),
        (("callbacks.suites.every_n_steps=2",), "callbacks.suites.cheap_lengths: needed with"),
    ],
)
def test_refuses_before_it_trains(
    ic: Run, capsys: Capture, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    (tmp_path / "books.txt").write_text("It was late, and nobody came. " * 400)
    assert ic(*CHOSEN, *args) == 2
    assert message in capsys.readouterr().err
    metrics = tmp_path / "runs/debug/default/csv/metrics.csv"
    assert not metrics.exists() or not list(csv.DictReader(metrics.open()))
