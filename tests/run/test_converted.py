"""The stages behind a conversion, tiny: `long_128k` extends a folder's model, `sft_converted` lets
it converse, each by one command.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SMALL, randomize

Run = Callable[..., int]
TINY = (
    "data.context_length=1024",
    "data.tokens_per_batch=1024",
    "data.max_position=4096",
    "data.num_workers=0",
    "model.attention=torch",
    "optimizer.warmup_steps=1",
    "trainer.max_steps=4",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "strategy=auto",
    "callbacks.memory=null",
)
LONG = (
    "fit",
    "experiment=long_128k",
    "model.init_from=healed",
    "data.train_files=[books.jsonl]",
    "data.val_files=[heldout.jsonl]",
    "data.token_cache=tokens",
    "data.val_batches=2",
    "data.least_document_tokens=2000",
    "callbacks.context_length.stages=[[0,512],[2,1024]]",
    *TINY,
)
SFT = (
    "fit",
    "experiment=sft_converted",
    "model.init_from=runs/long_128k/default/checkpoints/last",
    "data.train_files=['bundled:conversations-val.jsonl']",
    "data.needle_files=[books.jsonl]",
    "data.needle_fraction=0.5",
    *TINY,
)


@pytest.fixture
def healed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of 512 positions with its tokenizer, and the books."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": 384, "num_hidden_layers": 2, "max_position_embeddings": 512}
    model = MLAForCausalLM(MLAConfig(**sizes))
    randomize(model)
    model.save_pretrained(tmp_path / "healed")
    ByteTokenizer().save_pretrained(tmp_path / "healed")
    for name, mark in (("books", "whale"), ("heldout", "shark")):
        texts = [" ".join(f"The {mark} number {n * m} swam." for n in range(150)) for m in (1, 2)]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "healed"


@pytest.mark.slow
@pytest.mark.usefixtures("healed")
def test_a_healed_model_is_extended_and_converses(ic: Run, tmp_path: Path) -> None:
    assert ic(*LONG) == 0
    run = tmp_path / "runs/long_128k/default"
    config = json.loads((run / "checkpoints/last/config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 2e6
    assert config["max_position_embeddings"] == 2**20
    reached = json.loads((run / "context_length.json").read_text())["reached"]
    assert [(row["step"], row["context_length_tokens"]) for row in reached] == [(0, 512), (2, 1024)]
    rows = list(csv.DictReader((run / "csv/metrics.csv").open()))
    trained = [row for row in rows if row["train/loss"]]
    assert [float(row["train/context_length"]) for row in trained] == [512, 512, 1024, 1024]
    assert all(math.isfinite(float(row["train/loss"])) for row in trained)
    (validated,) = [row for row in rows if row["val/loss"]]
    assert validated["val/answer_accuracy"]

    assert ic(*SFT) == 0
    last = tmp_path / "runs/sft_converted/default/checkpoints/last"
    config = json.loads((last / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 2e6  # the folder's, which is kept
    assert config["max_position_embeddings"] == 2**20
    assert AutoTokenizer.from_pretrained(last).chat_template == ByteTokenizer().chat_template


def test_asks_for_a_folder_and_for_texts(ic: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert ic("fit", "experiment=long_128k") == 2
    assert "model=pretrained takes the sizes and weights of a folder" in capsys.readouterr().err
