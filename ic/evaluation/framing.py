"""A prompt as plain text or as a turn of the model's own chat template, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.model.byte_tokenizer import ByteTokenizer

_MARKER = "\x00"  # stands for the text, which need not be rendered to count its tokens


@dataclass(frozen=True)
class Frame:
    """What surrounds a prompt's text: token ids (n,) int64 before it and after it."""

    before: np.ndarray
    after: np.ndarray

    def __len__(self) -> int:
        """Tokens that the text cannot have."""
        return len(self.before) + len(self.after)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids (n,) int64 without special tokens."""
    if isinstance(tokenizer, ByteTokenizer):  # a million bytes in a moment instead of seconds
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    return _encode_rendered(tokenizer, text)


def frame_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, question: str = "", answer_prefix: str = ""
) -> Frame:
    """The frame of a text that ends with `question`, and an answer that begins with a prefix.

    The parts are tokenised one by one, so that a text of any length keeps its tokens whatever
    surrounds it.

    Args:
        prompt: `plain` or `chat`. A plain prompt begins with the tokenizer's own first token, if
            it adds one.
        question: the end of the user's turn, after the text.
        answer_prefix: how the model's answer begins; its continuation is what is scored.

    Raises:
        ValueError: `chat`, and the tokenizer has no chat template.
    """
    if prompt == "plain":
        first = _first_tokens(tokenizer)
        return Frame(np.asarray(first, dtype=np.int64), encode(tokenizer, question + answer_prefix))
    if not tokenizer.chat_template:
        raise ValueError(
            "prompt=chat: the tokenizer has no chat template; choose prompt=plain, or give a "
            "tokenizer with one"
        )
    turn = [{"role": "user", "content": _MARKER + question}]
    rendered = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, _, after = rendered.partition(_MARKER)
    return Frame(
        _encode_rendered(tokenizer, before), _encode_rendered(tokenizer, after + answer_prefix)
    )


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """With the template's own special tokens as tokens."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: a first token, or nothing."""
    marked = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
    return list(marked[:at])
