"""What a token is in an answer's log-probabilities: its text and its bytes."""

from __future__ import annotations

import re
from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ic.model.byte_tokenizer import ByteTokenizer

_BYTE_OF = {spelled: byte for byte, spelled in bytes_to_unicode().items()}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """Texts and bytes of tokens, remembered: the same few are asked for over and over."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=2**16)(self._of)

    def _of(self, token_id: int) -> tuple[str, bytes | None]:
        """The text of a token and its bytes; None where the tokenizer does not tell them.

        A piece of a character has no text. It is written as OpenAI writes it, `bytes:\\xf0\\x9f`.
        An id that the tokenizer has no token for is written as vLLM writes it, `token_id:300`.
        """
        spelled: str | None = self._tokenizer.convert_ids_to_tokens(token_id)  # type: ignore[assignment]
        if not spelled:
            return f"token_id:{token_id}", None
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        if _UNKNOWN not in text:
            if spelled.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
                text = f" {text}"  # SentencePiece drops the space in front of a text
            return text, text.encode()
        found = self._bytes(token_id, spelled)
        if found is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found

    def _bytes(self, token_id: int, spelled: str) -> bytes | None:
        """The bytes of a token that is no whole text."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return bytes([token_id]) if token_id < 2**8 else None
        if fallback := _FALLBACK.fullmatch(spelled):
            return bytes.fromhex(fallback[1])
        if all(letter in _BYTE_OF for letter in spelled):  # byte-level BPE
            return bytes(_BYTE_OF[letter] for letter in spelled)
        return None
