"""The byte tokenizer as a Hugging Face tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


CHATS = [
    [
        {"role": "system", "content": "größe"},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "ja 中文 <|end|> x"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "no"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}],
]
FORMS: dict[str, dict[str, Any]] = {
    "lists": {},
    "padded": {"padding": True},
    "tensors": {"padding": True, "return_tensors": "pt"},
    "truncated": {"truncation": True, "max_length": 31},
    "truncated and padded": {"truncation": True, "max_length": 31, "padding": "max_length"},
}


def of_tokenizers(tokenizer: ByteTokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """The same by the library `tokenizers`, whose mask transformers makes itself."""
    tokenizer.save_pretrained(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.padding_side, theirs.truncation_side = tokenizer.padding_side, tokenizer.truncation_side
    return theirs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_assistant_mask_equals_theirs(form: str, padding: str, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(padding_side=padding)
    theirs = of_tokenizers(tokenizer, tmp_path)
    for chats in (CHATS, CHATS[:1], CHATS[0]):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, **FORMS[form]}
        got = tokenizer.apply_chat_template(chats, **options)
        expected = theirs.apply_chat_template(chats, **options)
        for key in ("input_ids", "attention_mask", "assistant_masks"):
            assert torch.is_tensor(got[key]) == ("return_tensors" in options)
            ours = got[key].tolist() if torch.is_tensor(got[key]) else got[key]
            assert ours == (
                expected[key].tolist() if torch.is_tensor(expected[key]) else expected[key]
            )


def marked(tokenizer: ByteTokenizer, **options: Any) -> str:
    encoding = tokenizer.apply_chat_template(
        CHATS[0], return_dict=True, return_assistant_tokens_mask=True, **options
    )
    pairs = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, mask in pairs if mask])


def test_assistant_mask_of_a_chat_cut_on_the_left() -> None:
    """transformers marks nothing behind a block that was dropped."""
    tokenizer = ByteTokenizer(truncation_side="left", padding_side="left")
    assert marked(tokenizer) == "ja 中文 <|end|> x<|eos|>no<|eos|>"
    for length, kept in ((4, "no<|eos|>"), (2, "o<|eos|>"), (8, "x<|eos|>no<|eos|>")):
        options = {"truncation": True, "max_length": length}
        assert marked(tokenizer, **options) == kept
        assert marked(tokenizer, **options, padding="max_length") == kept


def test_assistant_mask_beside_added_tokens_that_strip() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(
        [AddedToken("<t>", lstrip=True, rstrip=True), AddedToken("<w>", single_word=True)]
    )
    chat = [
        {"role": "user", "content": "a \u00a0 <t> \u00a0\u00a3 b"},
        {"role": "assistant", "content": "  <t>  yes <t> a<w>b <w> "},
        {"role": "user", "content": "<t>"},
        {"role": "assistant", "content": "no"},
    ]
    encoding = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    kept = tokenizer.decode([token for token, mask in pairs if mask])
    assert kept == "<t>yes<t>a<w>b <w> <|eos|>no<|eos|>"
    tokenizer.truncation_side = "left"
    options = {"truncation": True, "max_length": 8, "return_dict": True}
    cut = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    assert cut["input_ids"] == encoding["input_ids"][-8:]
    assert cut["assistant_masks"] == encoding["assistant_masks"][-8:]


@pytest.mark.parametrize(
    "options", [{"tokenize": False}, {"return_dict": False}, {"continue_final_message": True}]
)
def test_assistant_mask_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="return_assistant_tokens_mask=True goes with"):
        TOKENIZER.apply_chat_template(CHATS[0], return_assistant_tokens_mask=True, **options)
