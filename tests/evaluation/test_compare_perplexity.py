"""The verb `compare` on perplexity: documents in pairs, by band of positions, and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ic.files.json_lines import write_rows
from ic.files.results import read_json

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

EDGES = [1, 128, 256, 512]


def write_losses(
    folder: Path, nll_DE: np.ndarray, *, model: str, length: int = 512, **changes: str
) -> None:
    """A folder of the suite perplexity: documents (D) with losses per token in each band (E)."""
    counts_E = np.diff(EDGES)
    rows = [
        {
            "model": model,
            "settings": "s",
            "tokenizer": "t",
            "task": "full",
            "length_tokens": length,
            "samples": len(nll_DE),
            "index": index,
            "expected": f"book {index}",
            "text": "",
            "correct": None,
            "measured": {
                "window_tokens": None,
                "edges": EDGES,
                "nats": (nll_E * counts_E).tolist(),
                "bytes": (4 * counts_E).tolist(),
            },
            "seconds": 0.1,
            **changes,
        }
        for index, nll_E in enumerate(nll_DE)
    ]
    write_rows(folder / "perplexity/samples.jsonl", rows)
    (folder / "perplexity/results.json").write_text(json.dumps({"config": {"suite": "perplexity"}}))


def two_models(folder: Path, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """B is better by about 0.05 nats per token at the first positions and not at the last; the
    documents are far more apart than the models.
    """
    random = np.random.default_rng(0)
    a_DE = 3.0 + random.normal(0, 0.5, (documents, 1)) + random.normal(0, 0.1, (documents, 3))
    b_DE = a_DE - [0.05, 0.03, 0.0] + random.normal(0, 0.01, (documents, 3))
    write_losses(folder / "a", a_DE, model="a")
    write_losses(folder / "b", b_DE, model="b")
    return a_DE, b_DE


def test_documents_are_paired_by_position(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    a_DE, b_DE = two_models(tmp_path, 10)
    assert ic("compare", "a", "b", "output=out") == 0
    whole, *bands = read_json(tmp_path / "out/comparison.json")["rows"]
    counts_E = np.diff(EDGES)
    a_D, b_D = (nll_DE @ counts_E / counts_E.sum() for nll_DE in (a_DE, b_DE))
    assert whole["first"] == pytest.approx(math.exp(a_D.mean()))
    assert whole["second"] == pytest.approx(math.exp(b_D.mean()))
    assert whole["nll_difference"] == pytest.approx((b_D - a_D).mean())
    assert (whole["n"], whole["better"], whole["position"]) == (10, "B", "all")
    # Every document is better by B: two of the 2^10 exchanges are as far from 0.
    assert all(b_D < a_D)
    assert whole["p"] == pytest.approx(2 / 2**10)
    for values_D, row in ((b_D - a_D, whole), *zip((b_DE - a_DE).T, bands, strict=True)):
        low, high = stats.bootstrap(
            (values_D,), np.mean, n_resamples=9999, rng=1, vectorized=True
        ).confidence_interval
        assert (row["low_95"], row["high_95"]) == pytest.approx((low, high), abs=0.001)
    assert [(band["from_token"], band["to_token"]) for band in bands] == [
        (1, 128),
        (128, 256),
        (256, 512),
    ]
    out = " ".join(capsys.readouterr().out.split())
    lower = 100 * (1 - math.exp((b_D - a_D).mean()))
    assert f"perplexity full: B's perplexity is {lower:.1f} % lower at 512 (" in out
    assert "over 10 documents, 95 % between " in out
    assert "p = 0.002; lower in 2 of 3 bands of positions, most at 1-127 (" in out
    document = (tmp_path / "out/comparison.md").read_text()
    assert "| full | 512 | 128-255 | 10 |" in document
    assert (tmp_path / "out/perplexity.png").stat().st_size > 0
    assert not (tmp_path / "out/comparison.png").exists()  # nothing has a score
    assert "comparison.png" not in document
    # The other way round the other side is better by as much, said of its own perplexity.
    assert ic("compare", "b", "a", "output=back") == 0
    assert f"A's perplexity is {lower:.1f} % lower at 512 (" in " ".join(
        capsys.readouterr().out.split()
    )


def test_few_documents_tell_nothing(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    two_models(tmp_path, 4)  # two of 2^4 exchanges: p is 0.125 at best
    assert ic("compare", "a", "b", "output=four") == 0
    assert "perplexity full: at 512 no difference can be seen (" in " ".join(
        capsys.readouterr().out.split()
    )
    two_models(tmp_path, 1)
    assert ic("compare", "a", "b", "output=one") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "at 512 one document alone was read (" in out
    whole, *_ = read_json(tmp_path / "one/comparison.json")["rows"]
    assert (whole["low_95"], whole["p"], whole["better"]) == (None, 1.0, None)


def test_one_model_twice_does_not_differ(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    a_DE, _ = two_models(tmp_path, 10)
    write_losses(tmp_path / "c", a_DE, model="a")
    assert ic("compare", "a", "c", "output=out") == 0
    whole, *_ = read_json(tmp_path / "out/comparison.json")["rows"]
    assert (whole["low_95"], whole["high_95"], whole["p"]) == (0.0, 0.0, 1.0)


def test_other_documents_are_refused(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    two_models(tmp_path, 3)
    write_losses(tmp_path / "b", np.ones((3, 3)), model="b", expected="another book")
    assert ic("compare", "a", "b") == 2
    assert "asked A for book 0 and B for another book" in capsys.readouterr().err
