"""Prompts that are the same for everybody who is measured with the same options."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ic.studies.serving.options import ServingBenchmarkOptions


class Prompts:
    """Draws the prompts of a cell.

    Args:
        vocab_size: random tokens are below it.
        text: tokens to cut the prompts from, instead of random ones.

    Raises:
        ValueError: the text is shorter than the longest prompt.
    """

    def __init__(
        self, options: ServingBenchmarkOptions, vocab_size: int, text: Sequence[int] | None
    ) -> None:
        self._options = options
        self._vocab_size = vocab_size
        self._text = text
        longest = max(options.contexts) - options.output_tokens
        if text is not None and len(text) < longest:
            raise ValueError(
                f"prompt_file={options.prompt_file!r} has {len(text)} tokens, and the longest "
                f"prompt is to have {longest}; give a longer one, or shorter contexts"
            )

    def draw(self, batch: int, context: int, repeat: int) -> list[list[int]]:
        """The prompts of one repetition of a cell; they have the cell's first tokens in common."""
        shared, length = self._options.shared_tokens, context - self._options.output_tokens
        cell = f"{self._options.seed} {batch} {context}"
        head = self._tokens(shared, f"{cell} shared")
        return [
            head + self._tokens(length - shared, f"{cell} {repeat} {row}") for row in range(batch)
        ]

    def _tokens(self, length: int, seed: str) -> list[int]:
        generator = random.Random(seed)
        if self._text is None:
            return generator.choices(range(self._vocab_size), k=length)
        start = generator.randrange(len(self._text) - length + 1)
        return list(self._text[start : start + length])


def read_text(file: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text file.

    Raises:
        ValueError: it is no text.
        OSError: it cannot be read.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={file!r}: not valid UTF-8 ({error.reason})") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
