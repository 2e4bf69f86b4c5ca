"""What the model takes from a tokenizer."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ic.datamodules.tokenizers import vocabulary_size
from ic.model.byte_tokenizer import VOCAB_SIZE, ByteTokenizer


def test_the_embedding_has_a_multiple_of_64_rows() -> None:
    vocabulary = {f"word{i}": i for i in range(130)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="word0"))
    rows = vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=model))
    assert (rows, type(rows)) == (192, int)
    assert vocabulary_size(ByteTokenizer()) == VOCAB_SIZE
