"""Which tokens of a conversation the assistant writes, in a chat template that does not mark them.

Most templates have no `{% generation %}`. A conversation is then rendered a second time with a mark
in place of all that the assistant says: what stands where a mark stood is the assistant's. So is
what ends its turn (`<|im_end|>`), but not the white space behind that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.model.assistant_mask import token_starts
from ic.model.byte_tokenizer import ByteTokenizer

Messages = list[dict[str, Any]]
# Messages to the text that the chat template makes of them.
Render = Callable[[Messages], str]
_MARK = "\x00"


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which tokens are the assistant's."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default", "")
    return "{%generation" in str(template).replace("{%-", "{%").replace(" ", "")


def assistant_spans(render: Render, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and from which character to which the assistant writes.

    Raises:
        ValueError: the template writes something else than what the assistant says, or leaves some
            of it out.
    """
    whole = render(messages)
    said = [str(message["content"]) for message in messages if message["role"] == "assistant"]
    parts = render(_marked(messages)).split(_MARK)
    if len(parts) == len(said) + 1:
        # Many templates take the white space around a turn away.
        for contents in (said, [content.strip() for content in said]):
            if parts[0] + "".join(chain(*zip(contents, parts[1:], strict=True))) == whole:
                return whole, _spans(parts, contents, _end_of_turn(render, messages))
    raise ValueError(
        "the tokenizer's chat template writes something else than what the assistant says, so the "
        "assistant's tokens cannot be told; put {% generation %} and {% endgeneration %} around "
        "them in the template, or choose another with chat_template="
    )


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered conversation, and 1 for each that lies in a span, in part at least.

    Raises:
        ValueError: the tokenizer cannot tell where its tokens lie.
    """
    if isinstance(tokenizer, ByteTokenizer):
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        starts = token_starts(ids, text, added)
        ends = np.append(starts[1:], len(text))
        ends = np.maximum(ends, starts + 1)  # the bytes of one character begin in the same place
    elif tokenizer.is_fast:
        encoded: Any = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoded["input_ids"])
        starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    else:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in a text, so the "
            "assistant's cannot be told; give the folder a tokenizer.json"
        )
    mask = np.zeros(len(ids), dtype=np.int64)
    for begin, end in spans:
        mask |= (starts < end) & (ends > begin)
    marks: list[int] = mask.tolist()
    return ids, marks


def _marked(messages: Messages) -> Messages:
    return [
        {**message, "content": _MARK} if message["role"] == "assistant" else message
        for message in messages
    ]


def _end_of_turn(render: Render, messages: Messages) -> str:
    """What the template writes behind the last of what the assistant says."""
    last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
    return render(_marked(messages[: last + 1])).split(_MARK)[-1].rstrip()


def _spans(parts: list[str], contents: list[str], end: str) -> list[tuple[int, int]]:
    spans, at = [], len(parts[0])
    for content, behind in zip(contents, parts[1:], strict=True):
        stop = at + len(content)
        # Some templates end the last turn alone.
        spans.append((at, stop + len(end) if behind.startswith(end) else stop))
        at = stop + len(behind)
    return spans
