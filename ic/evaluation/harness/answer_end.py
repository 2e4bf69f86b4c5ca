"""Where an answer ends: at the end token, or at a stop string of the task's."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class AnswerEnd:
    """Watches an answer for its end.

    Args:
        end: the token that ends it; `until`, the strings that do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: int, until: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.end = end
        self.until = until
        self.tokens: int | None = None  # up to the end
        # No stop string is spelled by more tokens than it has bytes; one more may stand before it.
        self.reach = 2 + max((len(text.encode()) for text in until), default=0)

    def seen(self, out_T: Tensor) -> bool:
        """Whether the answer has ended by its last token."""
        if self.tokens is None:
            if int(out_T[-1]) == self.end:
                self.tokens = len(out_T) - 1
            elif self.until:
                tail = str(self.tokenizer.decode(out_T[-self.reach :].tolist()))
                if any(text in tail for text in self.until):
                    self.tokens = len(out_T)
        return self.tokens is not None

    def text(self, out_T: Tensor) -> str:
        """The answer without its end."""
        text = str(self.tokenizer.decode(out_T[: self.tokens].tolist(), skip_special_tokens=True))
        return str(postprocess_generated_text(text, list(self.until), None))
