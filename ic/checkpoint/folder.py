"""Checkpoints as folders: Hugging Face's files, and beside them the trainer's state.

    step=100/
        config.json, model.safetensors, tokenizer files     all that `evaluate`, `generate` and
        `transformers` need trainer.pt                                           optimizer,
        schedule, loops, callbacks, data position

A folder is written under a temporary name, flushed to disk and renamed: it is there whole or not at
    all.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.backends import ON_TORCH, Backends

WEIGHTS, CONFIG, TRAINER_STATE = "model.safetensors", "config.json", "trainer.pt"
_PREFIX = "model."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or used as asked."""


class FolderCheckpointIO(CheckpointIO):
    """Reads and writes the folders above for Lightning.

    Args:
        config: of the model that trains; a checkpoint of another architecture is refused.
        tokenizer: saved beside the weights.
    """

    def __init__(self, config: MLAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the folder `path`, replacing nothing until all of it is on disk.

        Raises:
            CheckpointError: the disk is full or not writable; what was there before is untouched.
        """
        target = Path(path)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            save_file(self._weights(checkpoint["state_dict"]), partial / WEIGHTS, {"format": "pt"})
            self.config.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
            torch.save(rest, partial / TRAINER_STATE)
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        except (OSError, RuntimeError, SafetensorError) as error:
            # safetensors and torch.save wrap the operating system's error each in its own way
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"could not save the checkpoint {target}: {error}. Earlier checkpoints are intact; "
                "free some space or set output_dir to another disk, then resume with ckpt_path=last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """State for Lightning to restore, weights included.

        Raises:
            CheckpointError: missing, truncated, or of another architecture.
        """
        folder = Path(path)
        check_same_architecture(self.config, load_config(folder), folder)
        state = _read(
            folder / TRAINER_STATE,
            lambda file: torch.load(file, weights_only=True, map_location="cpu"),
        )
        weights = read_weights(folder)
        if self.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        state["state_dict"] = {_PREFIX + name: tensor for name, tensor in weights.items()}
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def _weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {
            name.removeprefix(_PREFIX): tensor.detach().contiguous()
            for name, tensor in state_dict.items()
            if name.startswith(_PREFIX)
        }
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights


def load_config(folder: Path) -> MLAConfig:
    """The model configuration of a checkpoint folder.

    Raises:
        CheckpointError: no such folder, or its config.json is not ours or DeepSeek's.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder {folder}: give a folder that holds {CONFIG} and {WEIGHTS}"
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no {CONFIG}")
    try:
        raw, _ = MLAConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    kind = raw.get("model_type")
    if kind not in (MLAConfig.model_type, "deepseek_v2", "deepseek_v3"):
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}; infinite_context, and deepseek_v2 and "
            "deepseek_v3 with dense layers, can be loaded"
        )
    return MLAConfig.from_dict(raw)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's single safetensors file, on the CPU."""
    return _read(folder / WEIGHTS, load_file)


def load_model(folder: Path, backends: Backends = ON_TORCH) -> MLAForCausalLM:
    """The model of a checkpoint folder, in evaluation mode on the CPU.

    Raises:
        CheckpointError: missing, truncated, or tensors that do not fit the configuration.
    """
    config = load_config(folder)
    config.set_backends(backends)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no {WEIGHTS}")
    try:
        loaded: Any = MLAForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, dtype="auto"
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.eval()


def check_same_architecture(wanted: MLAConfig, found: MLAConfig, folder: Path) -> None:
    """Refuse weights of other dimensions, naming each that differs."""
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "q_lora_rank",
        "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "tie_word_embeddings", "rope_interleave", "length_temperature", "nope_layers",
    )  # fmt: skip
    different = [
        f"{key} {getattr(found, key)} (configured {getattr(wanted, key)})"
        for key in keys
        if getattr(found, key) != getattr(wanted, key)
    ]
    if different:
        raise CheckpointError(
            f"{folder} is of another architecture: {', '.join(different)}. Use the experiment that "
            "it was trained with, or another checkpoint"
        )


def _read(file: Path, load: Any) -> Any:
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} is not a complete checkpoint: it holds no {file.name}"
        )
    try:
        return load(file)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
