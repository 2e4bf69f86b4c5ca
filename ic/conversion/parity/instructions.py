"""The package's short instructions, and the prompt that asks one.

`instructions.jsonl` beside this file holds 50 instructions of twenty kinds, written for this
package and given away under CC0; the first twenty are of a kind each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Instruction:
    """What is asked, and of which kind it is."""

    kind: str
    instruction: str


def shipped_instructions() -> list[Instruction]:
    """The package's instructions in their order."""
    file = Path(__file__).with_name("instructions.jsonl")
    return [Instruction(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]


def prompt_of(tokenizer: PreTrainedTokenizerBase, instruction: str) -> np.ndarray:
    """Token ids (T,) int64 of a turn with the instruction, up to where the answer begins."""
    turn = [{"role": "user", "content": instruction}]
    rendered = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    return np.asarray(tokenizer(rendered, add_special_tokens=False)["input_ids"], dtype=np.int64)
