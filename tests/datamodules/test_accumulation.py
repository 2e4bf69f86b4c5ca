"""Target counts of a step are those of the micro-batches that were trained on in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from ic.datamodules.accumulation import Lookahead, count_targets
from ic.datamodules.options import PasskeyDataOptions, TextDataOptions
from ic.datamodules.passkey import PasskeyDataModule
from ic.datamodules.text import TextDataModule
from ic.model.byte_tokenizer import ByteTokenizer


class Witness(LightningModule):
    """Keeps the counts announced for each optimizer step and those of its micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.announced: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.lengths: list[int] = []
        self.steps: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert "ahead" not in batch
        if "num_targets" in batch:
            self.announced.append(batch["num_targets"])
            self.seen.append(torch.zeros(2, dtype=torch.int64))
            self.lengths.append(batch["input_ids"].shape[1])
        self.seen[-1] += count_targets(batch)
        self.steps.append(batch["step"])
        return self.weight * 0

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 2:  # type: ignore[union-attr]
            self.trainer.datamodule.set_context_length(256)  # type: ignore[union-attr]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def train(data: LightningDataModule, folder: Path, limit: int, accumulate: int) -> Witness:
    module = Witness()
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=5,
        max_epochs=-1,
        limit_train_batches=limit,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        barebones=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module


def passkey(folder: Path, workers: int) -> LightningDataModule:
    config = PasskeyDataOptions(context_length=256, tokens_per_batch=512, num_workers=workers)
    data = PasskeyDataModule(config, ByteTokenizer())
    data.set_context_length(128)
    return data


def text(folder: Path, workers: int) -> LightningDataModule:
    for index in range(40):
        (folder / f"{index}.txt").write_text(f"{index} " * (3 * index + 1))
    config = TextDataOptions(
        train_files=[f"{folder}/*.txt"],
        context_length=256,
        tokens_per_batch=512,
        num_workers=workers,
    )
    data = TextDataModule(config, ByteTokenizer())
    data.set_context_length(128)
    return data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [passkey, text])
def test_counts_of_a_step(make: Any, workers: int, tmp_path: Path) -> None:
    # Epochs of 7: each ends with a step of one micro-batch instead of three.
    module = train(make(tmp_path, workers), tmp_path, limit=7, accumulate=3)
    assert len(module.announced) == 5
    assert torch.stack(module.announced).equal(torch.stack(module.seen))
    assert module.lengths == [128, 128, 256, 256, 256]
    assert module.steps == list(range(13))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [passkey, text])
def test_epochs_do_not_repeat_batches(make: Any, workers: int, tmp_path: Path) -> None:
    module = Witness()
    module.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
        module.steps.append(batch["step"]) or module.weight * 0
    )
    data = make(tmp_path, workers)
    trainer = Trainer(
        max_steps=5,
        max_epochs=-1,
        limit_train_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert module.steps == [0, 1, 2, 3, 4]


def test_lookahead_of_a_finite_loader() -> None:
    batches = [{"step": step} for step in range(4)]
    ahead = [[b["step"] for b in batch["ahead"]] for batch in Lookahead(batches, 2)]
    assert ahead == [[1, 2], [2, 3], [3], []]


def test_count_targets_leaves_out_the_first_token() -> None:
    labels = torch.tensor([[5, 6, -100, 7]])
    marks = torch.tensor([[True, True, True, False]])
    assert count_targets({"labels": labels}).tolist() == [0, 2]
    assert count_targets({"labels": labels, "answer_mask": marks}).tolist() == [1, 2]
