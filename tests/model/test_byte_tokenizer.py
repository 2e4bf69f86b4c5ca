"""The byte tokenizer as a Hugging Face tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ic.model import MLAConfig
from ic.model.byte_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, ByteTokenizer

TOKENIZER = ByteTokenizer()


@given(st.text())
def test_tokens_are_bytes(text: str) -> None:
    if any(special in text for special in SPECIAL_TOKENS):
        return
    try:
        expected = list(text.encode())
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    ids = TOKENIZER(text)["input_ids"]
    assert ids == expected
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_follow_the_bytes() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 263))
    assert len(TOKENIZER) == 263 < VOCAB_SIZE
    assert TOKENIZER("a<|user|>b")["input_ids"] == [97, 260, 98]
    assert TOKENIZER.decode([97, 257, 98], skip_special_tokens=True) == "ab"
    assert TOKENIZER.decode([0xFF, 97]) == "\ufffda"
    config = MLAConfig()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(TOKENIZER, name)


@pytest.mark.parametrize("loader", [ByteTokenizer, AutoTokenizer])
def test_saves_and_loads(loader: type, tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    MLAConfig().save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    text = "naïve <|assistant|> , spaced  .\n"
    assert isinstance(loaded, ByteTokenizer)
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    batch = loaded(["ab", "c"], padding=True)
    assert batch["input_ids"] == [[97, 98], [99, 258]]
