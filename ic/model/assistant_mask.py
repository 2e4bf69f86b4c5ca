"""Which tokens of a chat are the assistant's, for a tokenizer whose tokens are bytes.

transformers marks them for tokenizers of the library `tokenizers`, which know the characters that
each token stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def token_starts(ids: Sequence[int], text: str, added: Mapping[int, str]) -> np.ndarray:
    """The character of the text that each token begins in.

    Args:
        ids: of the whole text; below 256 the bytes of UTF-8.
        added: the spelling of the others. They may have taken white space beside them away
            (`AddedToken.lstrip` and `rstrip`), which then belongs to no token.

    Raises:
        ValueError: the tokens are not the text's.
    """
    starts = _starts_in_a_row(ids, added)
    if starts[-1] == len(text):
        return starts[:-1]
    at = char = 0
    while at < len(ids):
        spelled = added.get(ids[at])
        if char >= len(text):
            raise ValueError(f"token {at} ({ids[at]}) lies behind the end of the text")
        if spelled is not None and text.startswith(spelled, char):
            starts[at] = char
            at, char = at + 1, char + len(spelled)
            continue
        encoded = list(text[char].encode())
        if list(ids[at : at + len(encoded)]) == encoded:
            starts[at : at + len(encoded)] = char
            at += len(encoded)
        elif not text[char].isspace():
            raise ValueError(f"token {at} ({ids[at]}) is not character {char} of the text")
        char += 1
    return starts[:-1]


def _starts_in_a_row(ids: Sequence[int], added: Mapping[int, str]) -> np.ndarray:
    """Where tokens begin if no white space is lost, and the end of the last."""
    tokens = np.asarray(ids, dtype=np.int64)
    # A character's continuation bytes, 0b10xxxxxx, follow its first and are no character.
    continues = (tokens >= 0x80) & (tokens < 0xC0)
    lengths = np.where(continues, 0, 1)
    for at in np.flatnonzero(tokens >= 256):
        lengths[at] = len(added[int(tokens[at])])
    starts = np.concatenate([[0], lengths.cumsum()])
    starts[:-1][continues] -= 1
    return starts


def assistant_mask(
    starts: np.ndarray,
    spans: Sequence[tuple[int, int]],
    attention: Sequence[int],
    truncated_left: bool,
) -> list[int]:
    """1 for each token of a row that begins within a span of characters, and 0 elsewhere.

    Args:
        starts: of the whole text's tokens, of which truncation may have dropped some at one end.
        attention: 1 where the row holds a token and 0 where it is padding.
    """
    marked = np.zeros(len(starts), dtype=np.int64)
    for begin, end in spans:
        marked |= (starts >= begin) & (starts < end)
    places = np.flatnonzero(np.asarray(attention))
    mask = np.zeros(len(attention), dtype=np.int64)
    mask[places] = marked[len(marked) - len(places) :] if truncated_left else marked[: len(places)]
    result: Any = mask.tolist()
    return result
