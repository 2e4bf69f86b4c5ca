"""TRL's trainers on a saved folder: each loads it by itself and takes a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.training.conftest import CONVERSATIONS, PAIRS

trl = pytest.importorskip("trl")
SETTINGS: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "max_steps": 1,
    "learning_rate": 1e-2,
}
PROMPTS = Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS])


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [sum(map(ord, text[0]["content"])) / 1000 for text in completions]


def dpo(folder: str, output: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = trl.DPOConfig(output, max_length=None, **SETTINGS)
    return trl.DPOTrainer(
        model,
        None,
        config,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=ByteTokenizer(),
    )


def dpo_of_a_folder(folder: str, output: str) -> Any:
    config = trl.DPOConfig(output, max_length=None, **SETTINGS)
    return trl.DPOTrainer(folder, args=config, train_dataset=Dataset.from_list(PAIRS))


def sft(folder: str, output: str) -> Any:
    config = trl.SFTConfig(output, max_length=None, **SETTINGS)
    return trl.SFTTrainer(folder, config, train_dataset=Dataset.from_list(CONVERSATIONS))


def grpo(folder: str, output: str) -> Any:
    config = trl.GRPOConfig(output, num_generations=2, max_completion_length=8, **SETTINGS)
    return trl.GRPOTrainer(folder, reward, args=config, train_dataset=PROMPTS)


def rloo(folder: str, output: str) -> Any:
    config = trl.RLOOConfig(output, num_generations=2, max_completion_length=8, **SETTINGS)
    return trl.RLOOTrainer(folder, reward, args=config, train_dataset=PROMPTS)


@pytest.mark.parametrize("make", [dpo, dpo_of_a_folder, sft, grpo, rloo])
def test_takes_a_step(
    byte_model: MLAForCausalLM, tmp_path: Path, make: Callable[[str, str], Any]
) -> None:
    folder = tmp_path / "model"
    byte_model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    trainer = make(str(folder), str(tmp_path / "output"))
    trainer.train()
    trained = dict(trainer.model.named_parameters())
    before = dict(byte_model.named_parameters())
    assert trained.keys() == before.keys()
    assert all(torch.isfinite(parameter).all() for parameter in trained.values())
    assert any(not trained[name].equal(before[name]) for name in before)
