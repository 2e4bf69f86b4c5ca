"""Preference pairs and conversations that are small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import VOCAB_SIZE, ByteTokenizer

# Prompts and completions of different lengths, in both orders.
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }
    for question, good, bad in (
        ("What is cached?", "A latent and a rotary key.", "All keys and values of every head."),
        ("How long?", "As long as the cache fits.", "No."),
        ("Which optimizer trains the matrices?", "Muon.", "A genetic algorithm, over night."),
        ("2 + 2?", "4", "5"),
    )
]
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": pair["prompt"] + pair["chosen"]} for pair in PAIRS
] + [
    {
        "messages": [
            *PAIRS[0]["prompt"],
            *PAIRS[0]["chosen"],
            *PAIRS[1]["prompt"],
            *PAIRS[1]["chosen"],
        ]
    }
]


@pytest.fixture
def byte_model(make_model: Callable[..., MLAForCausalLM]) -> MLAForCausalLM:
    """A small model with the byte tokenizer's vocabulary, in float32 and evaluation mode."""
    tokenizer = ByteTokenizer()
    return make_model(
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
