"""The documents' pictures, drawn from published rows.

A picture carries the fingerprint of what it was drawn from, so that a test can tell a stale one
without comparing pixels, which differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ic.display.figure import add_comment
from ic.evaluation.registry import build_suite
from ic.studies.tables.published import ROOT, load
from ic.studies.tables.retrieval import KINDS, STAGES, alignment_rows

Rows = list[dict[str, Any]]
# What of a suite's row is drawn.
_ANSWERS = ("task", "length_tokens", "depth", "n", "correct")
_DRAWN = {
    "passkey": _ANSWERS,
    "niah": _ANSWERS,
    "perplexity": (
        *("task", "length_tokens", "position", "from_token", "to_token", "n"),
        *("perplexity", "nll_low_95", "nll_high_95"),
    ),
}


@dataclass(frozen=True)
class Picture:
    """What a suite draws of its rows, in `docs/images`.

    Attributes:
        rows: makes what is drawn: rows of results files.
        trained_length: longest context in tokens that was trained, to be marked.
        suite: a heatmap of passkey or needle answers, or perplexity by position.
    """

    file: str
    title: str
    rows: Callable[[], Rows]
    trained_length: int | None = None
    suite: str = "passkey"

    def fingerprint(self) -> str:
        """SHA-256 of everything that is drawn."""
        rows = [[row[name] for name in _DRAWN[self.suite]] for row in self.rows()]
        drawn = json.dumps([self.title, self.trained_length, rows])
        return "sha256 of its data: " + hashlib.sha256(drawn.encode()).hexdigest()

    def draw(self) -> None:
        """Write the file."""
        path = ROOT / "docs" / "images" / self.file
        build_suite(self.suite).draw(
            self.rows(), path, title=self.title, trained_length=self.trained_length
        )
        add_comment(path, self.fingerprint())


def _stages(kind: str) -> Rows:
    """A panel for each stage of alignment."""
    return [
        row | {"task": name}
        for stage, name in STAGES.items()
        for row in alignment_rows(stage, kind)
    ]


def _answers(file: str) -> Rows:
    return [row for row in load(file)["rows"] if row["what"] == "passkey"]


def _one_panel() -> Rows:
    """Both tasks of InfiniteContext-1B in one panel, which stays legible in a README."""
    return [row | {"task": "both tasks"} for row in _answers("infinitecontext_1b-passkey.json")]


def _needles() -> Rows:
    """The converted model's answers in unseen books, a panel for each way of asking."""
    shown = {"own_words": "asked as it was stated", "other_words": "asked in other words"}
    files = ("4k-32k", "64k", "128k", "128k-other_words")
    rows = [r for f in files for r in load(f"smollm2_mla-h200-98k-niah-{f}.json")["rows"]]
    return [
        row | {"task": name} for task, name in shown.items() for row in rows if row["task"] == task
    ]


PICTURES = (
    Picture(
        "infinitecontext_1b-passkey.png",
        "InfiniteContext-1B: exact answers on synthetic text, both tasks pooled",
        _one_panel,
        trained_length=32768,
    ),
    Picture(
        "mla_tiny-passkey.png",
        "mla_tiny: passkey retrieval on synthetic text, step 600",
        lambda: _answers("mla_tiny-fit.json"),
        trained_length=1024,
    ),
    *(
        Picture(
            f"alignment-{kind}.png",
            f"InfiniteContext-1B: {shown}, synthetic data",
            partial(_stages, kind),
        )
        for kind, shown in KINDS.items()
    ),
    Picture(
        "smollm2_mla-perplexity.png",
        "SmolLM2-135M as MLA: perplexity by position",
        lambda: load("smollm2_mla-h200-98k-perplexity.json")["rows"],
        trained_length=98304,
        suite="perplexity",
    ),
    Picture(
        "smollm2_mla-niah.png",
        "SmolLM2-135M as MLA: facts in unseen books, unseen words and kinds of keys",
        _needles,
        trained_length=98304,
        suite="niah",
    ),
)
