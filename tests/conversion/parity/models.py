"""Tiny models of bytes, a Llama with grouped queries and one of ours, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ic.checkpoint.folder import load_model
from ic.conversion.parity.options import ParityConfig
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SMALL, randomize

LAYERS, KV_HEADS, HEAD_DIM, RANK, ROPE = 2, 2, 8, 8, 8
WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "the",
    "old",
    "keeper",
    "lit",
    "his",
    "lamp",
    "before",
    "night",
    "came",
    "over",
    "the",
    "rocks",
]


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    randomize(model)
    return _save(model, folder)


def save_mla(folder: Path) -> Path:
    torch.manual_seed(1)
    shape = {"vocab_size": 320, "num_hidden_layers": LAYERS, "kv_lora_rank": RANK}
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = MLAForCausalLM(MLAConfig(**{**SMALL, **shape, **ends, "qk_rope_head_dim": ROPE})).eval()
    randomize(model)
    return _save(model, folder)


def save_damaged(source: Path, folder: Path) -> Path:
    """A copy of a Llama with noise on one matrix."""
    model = LlamaForCausalLM.from_pretrained(source)
    torch.manual_seed(2)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight += 0.5 * weight.std() * torch.randn_like(weight)
    return _save(model, folder)


def write_text(file: Path, documents: int = 3, words: int = 700) -> Path:
    """Documents of a few thousand bytes, a paragraph each, all different."""
    texts = []
    for number in range(documents):
        said = [WORDS[(place * (number + 2) + place // 7) % len(WORDS)] for place in range(words)]
        sentences = [" ".join(said[at : at + 9]).capitalize() + "." for at in range(0, words, 9)]
        texts.append(f"Number {number}. " + " ".join(sentences))
    file.write_text("\n\n".join(texts))
    return file


def options(
    folders: dict[str, Path], original: str, converted: str, **changes: Any
) -> ParityConfig:
    """A small report of two of the folders."""
    given: dict[str, Any] = {
        "original": str(folders[original]),
        "converted": str(folders[converted]),
        "output": str(folders["reports"] / f"{original}_{converted}"),
        "text": [str(folders["text"])],
        "document_unit": "paragraph",
        "accelerator": "cpu",
        "lengths": [256, 600],
        "documents": 3,
        "context_tokens": [512, 8192],
        "retrieval_lengths": [1024],
        "niah_tasks": ["own_words"],
        "instructions": 3,
        "answer_tokens": 6,
        "speed_tokens": [64],
        "decode_tokens": 4,
    }
    return ParityConfig(**{**given, **changes})


def load(folder: Path) -> Any:
    """The model, loaded without our loading of sources."""
    if "llama" in (folder / "config.json").read_text():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    return load_model(folder)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder
