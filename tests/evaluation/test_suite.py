"""What every suite does with answers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ic.evaluation.suite import Sample
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.copy_word.grid import Config
from tests.evaluation.copy_word.suite import CopyWord
from tests.evaluation.oracle import OneByOne

TOKENIZER = ByteTokenizer()


class Dictated(OneByOne):
    """Continues every prompt with the same tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def answers(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        return torch.tensor([self.tokens[:new_tokens]] * len(ids_BT))


def test_an_answer_ends_with_the_end_token() -> None:
    """What a chat model writes into the turns after its own is not scored."""
    decoder = Dictated([*b"ab", TOKENIZER.eos_token_id, *b"cd"])
    samples = [Sample(np.arange(9), "ab", new_tokens) for new_tokens in (5, 2, 1)]
    scores = CopyWord(Config()).answer(decoder, TOKENIZER, samples)
    assert [(score.text, score.correct) for score in scores] == [("ab", 1), ("ab", 1), ("a", 0.5)]
