"""The text and the bytes of tokens, of each kind of tokenizer."""

from __future__ import annotations

import math
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from ic.inference.engine.request import TokenLogprob
from ic.model.byte_tokenizer import ByteTokenizer
from ic.serving.responses import ChatForm, CompletionForm
from ic.serving.token_text import TokenTexts
from tests.evaluation.small_bpe import small_bpe

TEXT = "The sea, größer 日本 \N{ROCKET}!"


def spelled(tokenizer: Any, text: str) -> bytes:
    """The bytes of a text, token by token."""
    texts = TokenTexts(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [texts.of(token) for token in ids]
    assert all(found is not None for _, found in pieces)
    for shown, found in pieces:
        try:
            assert shown == found.decode()
        except UnicodeDecodeError:
            assert shown == "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
    return b"".join(found for _, found in pieces)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama's kind: words begin with a block, and what is not known is spelled in bytes."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁Theseagrlnd,!ß", "▁The", "▁sea"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e")]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(["▁T", "▁Th"])}
    own = Tokenizer(BPE(vocabulary, merges, byte_fallback=True))
    own.pre_tokenizer = Metaspace()
    own.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=own)


def test_bytes_of_tokens_are_those_of_the_text() -> None:
    assert spelled(ByteTokenizer(), TEXT) == TEXT.encode()
    assert spelled(small_bpe(), TEXT) == TEXT.encode()
    assert spelled(sentencepiece(), TEXT) == f" {TEXT}".encode()


def test_special_and_unknown_tokens() -> None:
    texts = TokenTexts(ByteTokenizer())
    assert texts.of(257) == ("<|eos|>", b"<|eos|>")
    assert texts.of(319) == ("token_id:319", None)


def test_what_cannot_come_is_a_number() -> None:
    texts = TokenTexts(ByteTokenizer())
    logprobs = [TokenLogprob(65, -0.5, ((65, -0.5), (66, -math.inf)))]
    chat: Any = ChatForm("a", "m", texts)._logprobs(0, logprobs)
    assert [t["logprob"] for t in chat["content"][0]["top_logprobs"]] == [-0.5, -9999.0]
    completion: Any = CompletionForm("a", "m", texts, [""])._logprobs(0, logprobs)
    assert completion["top_logprobs"] == [{"A": -0.5, "B": -9999.0}]
