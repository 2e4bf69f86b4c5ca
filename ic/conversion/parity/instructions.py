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

from ic.conversion.parity.options import ParityOptions

Message = dict[str, str]


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
    return prompt_after(tokenizer, [{"role": "user", "content": instruction}])


def conversations(options: ParityOptions) -> list[list[str]]:
    """What the user says in each conversation, `turns` of the package's instructions."""
    said = [each.instruction for each in shipped_instructions()]
    turns = options.turns
    return [said[i * turns : (i + 1) * turns] for i in range(options.conversations)]


def prompt_after(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> np.ndarray:
    """Token ids (T,) int64 of a conversation, up to where the next answer begins."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return np.asarray(tokenizer(str(text), add_special_tokens=False)["input_ids"], dtype=np.int64)
