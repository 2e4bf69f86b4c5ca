"""Small models that write conversations, and what their files hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import randomize

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
EOS, END = 257, 262
OPTIONS = ("max_question_tokens=12", "max_answer_tokens=16", "batch_size=3", "accelerator=cpu")
DRAWN = ("answer_temperature=1.0", *OPTIONS)


@torch.no_grad()
def letters(model: Any, ends: float) -> Any:
    """A random model that writes small letters, and now and then one of the two ends of turns.

    Args:
        ends: scale of the rows of the head that end a turn.
    """
    randomize(model.eval())
    rows = model.lm_head.weight
    kept, end_rows = rows[97:123].clone(), rows[[EOS, END]].clone()
    rows.zero_()
    rows[97:123] = kept * 3
    rows[[EOS, END]] = end_rows * ends
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special: dict[str, Any] = {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": EOS}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=320, max_position_embeddings=512, **sizes, **heads, **special)
    )


def chats(file: Path) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(list(row) == ["messages"] for row in rows)
    return [row["messages"] for row in rows]


_TURNS = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER' -}}"
    "{%- else -%}{{- 'ASSISTANT' -}}{%- generation -%}{{- message['content'] + eos_token -}}"
    "{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT' -}}{%- endif -%}"
)


def written(user: str, assistant: str) -> ByteTokenizer:
    """A tokenizer whose template writes a user's message so, and this before the assistant's."""
    tokenizer = ByteTokenizer()
    template = _TURNS.replace("'USER'", user).replace("'ASSISTANT'", assistant)
    tokenizer.chat_template = template
    return tokenizer
