"""One report over all suites of an evaluation: what it says, how it grows, whose it is."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ic.files.json_lines import read_rows
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
PASSKEY = (
    "evaluation.lengths=[256]",
    "evaluation.depths=[0.5]",
    "evaluation.fillers=[random]",
    "evaluation.samples=2",
    "evaluation.control_samples=1",
)
PERPLEXITY = (
    "suite.perplexity.files=[books.txt]",
    "suite.perplexity.lengths=[256]",
    "suite.perplexity.samples=1",
    "suite.perplexity.tasks=[full]",
)


@pytest.fixture
def models(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> None:
    """Two models of other weights, `one` and `two`, and a text."""
    model = make_model(vocab_size=320)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        ByteTokenizer().save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
    (tmp_path / "books.txt").write_text("It was late, and nobody came. " * 20)


def evaluate(ic: Run, model: str, *args: str) -> int:
    passkey = () if "suite=perplexity" in args else PASSKEY
    return ic("evaluate", f"checkpoint={model}", "accelerator=cpu", *passkey, *args)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("models")
def test_a_page_and_a_table_over_all_suites(
    ic: Run, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ("suite=[passkey,perplexity]", *PERPLEXITY, "output=out")
    out = tmp_path / "out"

    def stopped(self: GreedyDecoder, ids_BT: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(GreedyDecoder, "losses", stopped)
        assert evaluate(ic, "one", *both) == 130
    page = (out / "report.md").read_text()
    assert re.findall("^## (.*)", page, re.MULTILINE) == [
        "passkey: passkey retrieval on synthetic text"
    ]
    assert evaluate(ic, "one", *both) == 0
    assert "report: out/report.md" in capsys.readouterr().out
    page = (out / "report.md").read_text()
    assert page.startswith("# Evaluation of one\n")
    assert re.findall("^## (.*)", page, re.MULTILINE) == [
        "passkey: passkey retrieval on synthetic text",
        "perplexity: perplexity by position",
    ]
    weights = read_rows(out / "passkey/samples.jsonl")[0]["model"]
    assert f"| weights | {weights} |" in page
    assert "Synthetic: every text and every question." in page
    assert "Synthetic: nothing" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == ["passkey/heatmap.png", "perplexity/perplexity.png"]
    for picture in pictures:
        assert (out / picture).is_file()
    found = {
        name: json.loads((out / name / "results.json").read_text())
        for name in ("passkey", "perplexity")
    }
    assert found["passkey"]["commit"] in page
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert [row["what"] for row in rows] == [
        row["what"] for one in found.values() for row in one["rows"]
    ]
    assert rows[0]["n"] == str(found["passkey"]["rows"][0]["n"])


@pytest.mark.usefixtures("models")
def test_a_folder_of_another_model_or_suite_is_left_alone(
    ic: Run, capsys: Capture, tmp_path: Path
) -> None:
    assert evaluate(ic, "one", "output=out") == 0
    before = files(tmp_path / "out")
    for model, args, message in (
        ("two", (), "output=out: out holds the answers of another model (one); choose another"),
        ("two", ("suite=[passkey,perplexity]", *PERPLEXITY), "holds the answers of another model"),
        ("one", ("suite=perplexity", *PERPLEXITY), "output=out: holds the suite passkey; choose"),
    ):
        assert evaluate(ic, model, "output=out", *args) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert files(tmp_path / "out") == before
    assert evaluate(ic, "one", "output=out", "evaluation.samples=1") == 0  # another grid adds to it
    (tmp_path / "file").write_text("mine")
    assert evaluate(ic, "one", "output=file") == 2
    assert "output=file: is a file; give a folder" in capsys.readouterr().err
