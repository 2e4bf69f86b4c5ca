"""Inside transformers' Trainer: a step is the same however it is cut into micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ic.model import MLAForCausalLM
from tests.deepseek import deepseek_twin

pytest.importorskip("accelerate")


class Rows(Dataset[dict[str, Any]]):
    """Eight rows, of whose tokens each has another share as targets."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(32, 120, (24,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: 2 * index] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def first_step(model: PreTrainedModel, steps: int, rows: int, folder: Path) -> tuple[float, float]:
    """The logged loss and gradient norm of one step of `steps` micro-batches."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=steps,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=1e9,
    )
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=Rows())
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return float(log["loss"]), float(log["grad_norm"])


def test_accumulated_steps_are_equal(byte_model: MLAForCausalLM, tmp_path: Path) -> None:
    theirs = first_step(deepseek_twin(byte_model), 1, 8, tmp_path)
    for steps, rows in ((1, 8), (4, 2), (8, 1)):
        assert first_step(byte_model, steps, rows, tmp_path) == pytest.approx(theirs, rel=1e-5)
