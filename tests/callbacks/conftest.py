"""A small real model, its LightningModule and data: what the callbacks watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ic.model.config import MLAConfig
from ic.model.modeling_mla import MLAForCausalLM

BATCH, TOKENS = 2, 16


def tiny_config(**changes: Any) -> MLAConfig:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return MLAConfig(**(sizes | changes))


class TinyModule(pl.LightningModule):
    """Calls the functions in `during`, by hook name, so that a test can move a clock."""

    def __init__(self, during: dict[str, Callable[[], None]] | None = None, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MLAForCausalLM(tiny_config(**changes))
        self.during = during or {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.during.get("training_step", lambda: None)()
        loss = self.model(**batch).loss
        self.log("train/loss", loss.detach())
        self.log("train/answer_accuracy", torch.tensor(0.875))
        self.log("train/context_length", float(batch["input_ids"].shape[1]))
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.during.get("validation_step", lambda: None)()
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Batches(Dataset):
    """One item is one batch of the given context length; `on_fetch` runs when it is fetched."""

    def __init__(self, lengths: Iterable[int], on_fetch: Callable[[], None] = lambda: None) -> None:
        self.lengths = list(lengths)
        self.on_fetch = on_fetch

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.on_fetch()
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 32, (BATCH, self.lengths[index]), generator=generator)
        return {"input_ids": ids, "labels": ids}


@pytest.fixture
def make_module() -> type[TinyModule]:
    return TinyModule


@pytest.fixture
def make_loader() -> Callable[..., DataLoader]:
    def make(
        lengths: int | Iterable[int], on_fetch: Callable[[], None] = lambda: None
    ) -> DataLoader:
        if isinstance(lengths, int):
            lengths = [TOKENS] * lengths
        return DataLoader(Batches(lengths, on_fetch), batch_size=None)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **changes: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **(settings | changes))

    return make
