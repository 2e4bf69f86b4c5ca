"""A small model in a checkpoint folder, whose layers groups of 32 divide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ic.checkpoint.folder import FolderCheckpointIO
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer

DIMS = {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "q_lora_rank": 32,
    "intermediate_size": 96,
    "v_head_dim": 16,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@pytest.fixture
def checkpoint(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(**changes)` saves a model of these dimensions -> its folder."""

    def save(**changes: object) -> Path:
        model = make_model(**{**DIMS, **changes})
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        folder = tmp_path / "runs/small/default/checkpoints/step=7"
        io = FolderCheckpointIO(model.config, ByteTokenizer())
        io.save_checkpoint({"state_dict": state, "context_length": 2048}, folder)
        return folder

    return save
