"""A byte-level tokenizer: token n is byte n, and a few special tokens follow.

It needs no vocabulary file that was trained on anything, so synthetic tasks start from random
weights alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ic.files.atomic_write import write_json
from ic.model.config import MLAConfig

# `transformers` numbers them in this order: named tokens first, then the others.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
# The assistant's turns end with eos, so that `generate` stops there.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ('system', 'user') -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('role ' + message['role'] + ': use system, user or assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# A multiple of 64 keeps the head's matrix product aligned; the rest is free for added tokens.
VOCAB_SIZE = 320


class _ByteEncoding(BatchEncoding):
    """An encoding of one text that knows which token each character belongs to.

    transformers gives that to fast tokenizers alone, and needs it to mark the assistant's tokens.
    """

    special_lengths: dict[int, int]

    def char_to_token(  # type: ignore[override]  # the parent's annotation leaves None out
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        char = batch_or_char_index if char_index is None else char_index
        starts = self._char_starts()
        return None if char >= starts[-1] else int(np.searchsorted(starts, char, side="right")) - 1

    def _char_starts(self) -> np.ndarray:
        ids = np.asarray(self["input_ids"])
        chars = np.ones(len(ids), dtype=np.int64)
        for at in np.flatnonzero(ids >= 256):
            chars[at] = self.special_lengths[int(ids[at])]
        # A character's continuation bytes, 0b10xxxxxx, follow its first and add no character.
        chars[(ids >= 0x80) & (ids < 0xC0)] = 0
        return np.concatenate([[0], chars.cumsum()])


class ByteTokenizer(PreTrainedTokenizer):
    """Bytes of UTF-8 as tokens 0-255, then `SPECIAL_TOKENS`.

    Saves and loads as a Hugging Face tokenizer (`save_pretrained`,
    `AutoTokenizer.from_pretrained`). Tokens are written as one character of Latin-1 a byte; invalid
    UTF-8 decodes to U+FFFD.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    vocab_files_names = {"vocab_file": "byte_vocab.json"}  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        # The file only marks a folder as holding this tokenizer; its content is fixed.
        self._bytes = {chr(i): i for i in range(256)}
        kwargs.setdefault("bos_token", SPECIAL_TOKENS[0])
        kwargs.setdefault("eos_token", SPECIAL_TOKENS[1])
        kwargs.setdefault("pad_token", SPECIAL_TOKENS[2])
        kwargs.setdefault("extra_special_tokens", list(SPECIAL_TOKENS[3:]))
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {**self._bytes, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text.encode("utf-8").decode("latin-1"))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if not isinstance(tokens, list):
            return super().convert_tokens_to_ids(tokens)
        ids = {**self._bytes, **self._added_tokens_encoder}  # one lookup a token, not three
        return [ids.get(token) for token in tokens]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._bytes.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        # The rows of the head past the last token exist for alignment alone; they spell nothing.
        return chr(index) if index < 256 else ""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        encoding = super()._encode_plus(text, *args, **kwargs)
        if isinstance(text, str) and isinstance(encoding["input_ids"], list):
            encoding = _ByteEncoding(encoding.data)
            encoding.special_lengths = {
                index: len(token.content) for index, token in self.added_tokens_decoder.items()
            }
        return encoding

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        out = bytearray()
        for token in tokens:
            out += bytes([ord(token)]) if token in self._bytes else token.encode("utf-8")
        return out.decode("utf-8", errors="replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}byte_vocab.json"
        write_json(path, {"kind": "bytes", "size": 256})
        # The same for programs that do not import this class, such as servers.
        theirs = path.with_name(f"{prefix}tokenizer.json")
        self._of_tokenizers().save(str(theirs))
        return (str(path), str(theirs))

    def _of_tokenizers(self) -> Tokenizer:
        """The same tokenizer made of parts of the library `tokenizers`."""
        spelled = bytes_to_unicode()
        tokenizer = Tokenizer(BPE(vocab={spelled[i]: i for i in range(256)}, merges=[]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = ByteLevelDecoder()
        for _, token in sorted(self.added_tokens_decoder.items()):
            tokenizer.add_tokens([token])
        return tokenizer


AutoTokenizer.register(MLAConfig, slow_tokenizer_class=ByteTokenizer, exist_ok=True)
