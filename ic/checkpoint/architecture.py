"""Whether the weights of a checkpoint are a model's: its dimensions, and its tensors by name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.hugging_face import CONFIG
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.indexer_options import INDEXER_SHAPE


def check_same_architecture(wanted: MLAConfig, found: MLAConfig, folder: Path) -> None:
    """Refuse weights of other dimensions, naming each that differs; of an indexer those where both
    have one.
    """
    keys: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "tie_word_embeddings",
        "rope_interleave",
        "attention_bias",
        "length_temperature",
        "nope_layers",
        "latent_norm",
        "rope_repeats",
        "rope_pairs",
        "rope_pairs_dim",
        "query_bias",
        "qk_norm_dim",
    )
    if "off" not in (wanted.indexer, found.indexer):
        keys += INDEXER_SHAPE
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


def check_tensors(config: MLAConfig, found: Collection[str], folder: Path) -> None:
    """Refuse weights that lack a tensor of the model's, or hold another; a tied head is not saved.

    Raises:
        CheckpointError: naming the first.
    """
    with torch.device("meta"):
        wanted = set(MLAForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        wanted.remove("lm_head.weight")
    check_names(folder, wanted - set(found), set(found) - wanted)


def check_names(folder: Path, missing: set[str], unexpected: set[str]) -> None:
    """
    Raises:
        CheckpointError: there are any.
    """
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, the first is {min(missing)}")
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {len(unexpected)} tensors that the model has no place for, the first "
            f"is {min(unexpected)}: is it of another architecture than its {CONFIG} says?"
        )
