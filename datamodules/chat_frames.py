"""What a tokenizer's chat template puts around the turns of a conversation, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ic.datamodules.conversations import common_prefix

_TURN = "\x00"  # stands for what a turn says, which need not be rendered
_ASKED = [{"role": "user", "content": _TURN}, {"role": "assistant", "content": _TURN}]


@dataclass(frozen=True)
class ChatFrames:
    """Token ids (n,) int64 between the turns of user and assistant, one after the other.

    Attributes:
        before: what stands before the user's first turn.
        to_answer: between a turn of the user and the assistant's.
        end_of_turn: what the assistant writes to end its turn.
        to_question: between the end of the assistant's turn and the user's next one.
        end: behind the end of the assistant's last turn.
    """

    before: np.ndarray
    to_answer: np.ndarray
    end_of_turn: np.ndarray
    to_question: np.ndarray
    end: np.ndarray


def chat_frames(tokenizer: PreTrainedTokenizerBase) -> ChatFrames:
    """Of the tokenizer's chat template.

    Raises:
        ValueError: it has none, or one that changes or repeats what is said.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "data.question_weights.chat: the tokenizer has no chat template; set it to 0, or "
            "choose a template with chat_template="
        )
    try:
        rendered = str(tokenizer.apply_chat_template([*_ASKED, *_ASKED], tokenize=False))
    except TemplateError as error:
        raise ValueError(
            f"data.question_weights.chat: the tokenizer's chat template refuses turns of user and "
            f"assistant ({error}); set it to 0, or choose a template with chat_template="
        ) from error
    parts = rendered.split(_TURN)
    if len(parts) != 5:
        raise ValueError(
            "data.question_weights.chat: the tokenizer's chat template does not write each turn "
            "once, as it is; set it to 0, or choose a template with chat_template="
        )
    before, to_answer, to_question, _, end = (
        np.asarray(tokenizer(part, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for part in parts
    )
    # What ends the last turn and comes before the next one, too: `<|im_end|>`, not the line end.
    ended = np.asarray(tokenizer(parts[-1].rstrip(), add_special_tokens=False)["input_ids"])
    shared = common_prefix(ended.tolist(), to_question.tolist())
    return ChatFrames(before, to_answer, to_question[:shared], to_question[shared:], end[shared:])
