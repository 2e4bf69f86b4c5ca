"""Whether a tokenizer can write what a suite asks with."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def check_characters(tokenizer: PreTrainedTokenizerBase, characters: str, suite: str) -> None:
    """Refuse a tokenizer that loses some of the characters; their case does not count.

    Args:
        suite: its name, for the message.

    Raises:
        ValueError: a character does not come back after `encode` and `decode`.
    """
    lost = []
    for character in dict.fromkeys(characters.lower()):
        ids = tokenizer(f"a {character} a", add_special_tokens=False)["input_ids"]
        if character not in str(tokenizer.decode(ids, skip_special_tokens=True)).lower():
            lost.append(character)
    if lost:
        raise ValueError(
            f"suite={suite}: the tokenizer cannot write {' '.join(lost)}; use a model whose "
            "tokenizer can, such as one of bytes"
        )
