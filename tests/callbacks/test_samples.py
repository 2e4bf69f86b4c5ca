"""Texts that a run writes while it trains: the same run with and without them, and what is kept."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ic.callbacks.options import SamplesOptions
from ic.callbacks.samples import continued
from ic.checkpoint.folder import load_model
from ic.cli import main
from ic.files.json_lines import read_rows
from ic.inference.engine.request import Sampling
from ic.inference.engine.sampler import Sampler
from ic.model.byte_tokenizer import ByteTokenizer

SAMPLES = (
    "callbacks.samples.prompts=['The ','A word']",
    "callbacks.samples.max_new_tokens=12",
    "callbacks.samples.every_n_validations=2",
)


def fit(folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "fit",
                "experiment=text_small",
                "data.train_files=[book.txt]".replace("book", str(folder / "book")),
                "data.val_fraction=0.3",
                "data.context_length=64",
                "data.tokens_per_batch=128",
                "model.num_hidden_layers=1",
                "trainer.max_steps=4",
                "trainer.val_check_interval=1",
                "trainer.log_every_n_steps=1",
                "callbacks.checkpoint.every_n_steps=1",
                "callbacks.checkpoint.keep_last=9",
                "callbacks.memory=null",
                # So that a draw from the training's generator would show.
                "model/adapter=lora",
                "model.adapter.lora_dropout=0.5",
                f"output_dir={folder}",
                *options,
            ]
        )
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    book = "\n\n".join(f"The {i}th paragraph has some words in it." for i in range(30))
    (folder / "book.txt").write_text(book)
    assert fit(folder, *SAMPLES, "run_id=with") == 0
    return folder / "text_small"


def losses(run: Path) -> list[tuple[str, str]]:
    rows = csv.DictReader((run / "csv/metrics.csv").open())
    return [(row["train/loss"], row["val/loss"]) for row in rows if row["train/loss"]]


def test_samples_are_kept_and_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(run / "with/samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (2, 4) for prompt in ("The ", "A word")
    ]
    events = EventAccumulator(str(next((run / "with/tensorboard").rglob("events.*")).parent))
    events.Reload()
    written = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("samples/0/text_summary")
    ]
    assert [step for step, _ in written] == [2, 4]
    assert written[0][1].startswith("    The ")


def test_a_sample_is_the_model_s_own_text(run: Path) -> None:
    """The last checkpoint, asked again without a cache."""
    tokenizer, options = ByteTokenizer(), SamplesOptions()
    model = load_model(run / "with/checkpoints/step=4")
    ids = tokenizer("A word")["input_ids"]
    sampler = Sampler(model.config.vocab_size, 1, torch.device("cpu"))
    how = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    slot = sampler.add(Sampling(**how), ids)
    found: list[int] = []
    with torch.no_grad():
        while len(found) < 12:
            logits = model(torch.tensor([[*ids, *found]])).logits[:, -1]
            token = sampler.draw(logits, [slot]).fetch()[0].token_id
            if token == tokenizer.eos_token_id:
                break
            found.append(token)
    assert read_rows(run / "with/samples.jsonl")[-1]["text"] == tokenizer.decode(found)


def test_samples_leave_training_as_it_is(run: Path) -> None:
    assert fit(run.parent, "callbacks.samples=null", "run_id=without") == 0
    assert losses(run / "without") == losses(run / "with")
    assert len(losses(run / "with")) == 4
    assert not (run / "without/samples.jsonl").exists()


def test_a_resumed_run_writes_no_sample_twice(run: Path) -> None:
    whole = read_rows(run / "with/samples.jsonl")
    assert fit(run.parent, *SAMPLES, "run_id=with", f"ckpt_path={run}/with/checkpoints/step=3") == 0
    assert read_rows(run / "with/samples.jsonl") == whole


def test_a_run_without_validation_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(run.parent, "data.val_fraction=0", "run_id=none") == 2
    assert "this run has none: give data.val_files or data.val_fraction" in capsys.readouterr().err


def test_greedy_sampling_ends_at_the_end(make_model: Any) -> None:
    model = make_model()
    ids = torch.tensor([5, 6, 7])
    free = continued(model, ids, Sampling(max_tokens=8), None)
    expected = model.generate(ids[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert free == expected[0, 3:].tolist()
    ended = continued(model, ids, Sampling(max_tokens=8), free[4])
    assert ended == free[: free.index(free[4])]


def test_a_model_without_numbers_writes_nothing(make_model: Any) -> None:
    """It is the guardrails' to stop the run."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert continued(model, torch.tensor([5]), Sampling(temperature=1.0), None) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": []},
        {"prompts": ["a", ""]},
        {"every_n_validations": 0},
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": 2.5},
        {"top_p": 0.0},
        {"seed": -1},
    ],
)
def test_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"callbacks\.samples\.{next(iter(changes))}="):
        SamplesOptions(**changes)
