"""What a model of any kind says of itself: how long a prompt may be, and what ends an answer."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedTokenizerBase

from ic.datamodules.chat_templates import stop_tokens


def positions_of(config: Any) -> int:
    """Tokens of the longest prompt with its answer; without a limit, as many as a number holds."""
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    return sys.maxsize if positions is None else positions


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's end token first, what ends a turn in its chat
    template, and those of the model's generation configuration; none without an end token.
    """
    if tokenizer.eos_token_id is None:
        return []
    return list(dict.fromkeys([*stop_tokens(tokenizer), *model_end_tokens(model)]))


def model_end_tokens(model: Any) -> list[int]:
    """Ids that end a text, of the model's generation configuration, which has one or several."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return own if isinstance(own, list) else [] if own is None else [own]
