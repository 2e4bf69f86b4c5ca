"""Runs on one's own text: the lengths they train at, and what can be done with their checkpoints."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ic.checkpoint.folder import load_model, trained_length
from ic.cli import main
from ic.datamodules.held_out import Part
from ic.files.json_lines import read_rows
from ic.model.byte_tokenizer import ByteTokenizer

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

TINY = (
    "model=mla_tiny",
    "model.num_hidden_layers=1",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=1",
    "data.num_workers=0",
    "callbacks.memory=null",
    "logger.tensorboard=false",
)
EOS = ByteTokenizer().eos_token_id
WORDS = "the sky is blue and the sea is deep; "


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on a small corpus, with the defaults of `data=text`."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"{number} {WORDS * 9}"}) for number in range(20)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "fit",
                "data=text",
                *TINY,
                f"data.train_files=[{folder / 'corpus.jsonl'}]",
                "data.val_fraction=0.3",
                "data.context_length=512",
                "data.tokens_per_batch=1024",
                "name=text",
                f"output_dir={folder}",
            ]
        )
    assert not exit_.value.code
    return folder / "text/default"


def test_text_trains_at_the_length_asked_for_and_asks_no_passkeys(text_run: Path) -> None:
    rows = list(csv.DictReader((text_run / "csv/metrics.csv").open()))
    lengths = [row["train/context_length"] for row in rows if row["train/loss"]]
    assert lengths == ["512.0", "512.0"]
    assert not (text_run / "passkey").exists()
    assert not (text_run / "context_length.json").exists()


def test_a_checkpoint_without_a_curriculum_is_evaluated(ic: Run, text_run: Path) -> None:
    last = text_run / "checkpoints/last"
    grid = ("lengths=[128]", "depths=[0.5]", "samples=1", "control_samples=0", "fillers=[noise]")
    options = [f"evaluation.{option}" for option in grid]
    assert ic("evaluate", f"checkpoint={last}", *options, "output=out") == 0
    assert len(read_rows(Path("out/samples.jsonl"))) == 1
    assert Path("out/heatmap.png").is_file()
    assert json.loads((last / "config.json").read_text())["trained_length"] == 512


def test_a_checkpoint_that_does_not_tell_its_length(text_run: Path, tmp_path: Path) -> None:
    """As written before the length had a key of its own: without a curriculum it was None."""
    config = json.loads((text_run / "checkpoints/last/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "trained_length": None}))
    torch.save({"TextDataModule": {"context_length": None}}, tmp_path / "trainer.pt")
    assert trained_length(tmp_path) is None


DATA = (("data=text",), ("data=sft",), ("data=preference", "preference=dpo"))


@pytest.mark.parametrize("data", DATA)
def test_a_curriculum_without_its_measure_is_refused(
    ic: Run, capsys: Capture, data: tuple[str, ...]
) -> None:
    assert ic("fit", *data, "callbacks/context_length=default") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train/answer_accuracy" in line
    assert f"{data[0]} does not have" in line
    assert "callbacks.context_length=null" in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("data", DATA)
def test_passkeys_are_asked_where_they_are_asked_for(
    ic: Run, capsys: Capture, data: tuple[str, ...]
) -> None:
    assert ic("fit", *data, "--print_config") == 0
    shown = capsys.readouterr().out
    assert "\n  passkey: null" in shown
    assert "\n  context_length: null" in shown
    assert ic("fit", *data, "callbacks/passkey=default", "--print_config") == 0
    assert "\n  passkey:\n    every_n_steps: 0" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["text", "sft"])
def test_a_run_without_validation_says_so(ic: Run, capsys: Capture, data: str) -> None:
    row = {"text": WORDS, "prompt": "a?", "completion": "b"}
    Path("rows.jsonl").write_text("\n".join([json.dumps(row)] * 9))
    size = ("data.context_length=64", "data.tokens_per_batch=64", "trainer.max_steps=1")
    assert ic("fit", f"data={data}", *TINY, *size, "data.train_files=[rows.jsonl]") == 0
    shown = capsys.readouterr().err
    assert "no validation: name data.val_files" in shown
    assert "across ranks" not in shown


def test_losses_of_text_are_logged_and_saved(text_run: Path) -> None:
    """Every token is a byte here but the end of a document: what a byte costs can be counted."""
    rows = list(csv.DictReader((text_run / "csv/metrics.csv").open()))
    logged = [{k: float(v) for k, v in row.items() if v} for row in rows]
    texts = [json.loads(line)["text"] for line in (text_run.parents[1] / "corpus.jsonl").open()]
    for split in ("train", "val"):
        measured = [row for row in logged if f"{split}/loss" in row]
        assert len(measured) == 2
        for row in measured:
            loss = row[f"{split}/loss"]
            assert row[f"{split}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
            # About one target in 330 is an end, which costs but is no byte.
            bits = row[f"{split}/bits_per_byte"] * math.log(2)
            assert loss < bits < loss * 1.01
    results = json.loads((text_run / "results.json").read_text())["rows"]
    saved = {row["split"]: row for row in results if row["what"] == "losses"}
    assert saved["val"]["step"] == 2
    assert saved["val"]["bits_per_byte"] == pytest.approx(logged[-1]["val/bits_per_byte"], rel=1e-6)

    # The validation again, by hand: all held-out documents in rows of 512.
    held_out = [text for text in texts if text in Part(0.3, held_out=True)]
    assert 0 < len(held_out) < len(texts)
    tokens = [token for text in held_out for token in [*text.encode(), EOS]]
    model = load_model(text_run / "checkpoints/last")
    total, num_bytes = 0.0, 0
    for start in range(0, len(tokens), 512):
        ids = torch.tensor([tokens[start : start + 512]])
        ends = [0, *(i + 1 for i, token in enumerate(ids[0].tolist()) if token == EOS)]
        for begin, end in itertools.pairwise([*ends, ids.shape[1]]):
            if end - begin > 1:
                piece = ids[:, begin:end]
                total += float(model(piece, labels=piece).loss.detach()) * (end - begin - 1)
                num_bytes += int((piece[:, 1:] < 256).sum())
    assert saved["val"]["bits_per_byte"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-4)
