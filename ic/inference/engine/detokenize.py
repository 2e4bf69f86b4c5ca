"""The text of an answer while its tokens come, in whole characters, up to a stop string or token.

All pieces together are what the tokenizer makes of all tokens at once (`decode` without special
tokens). A piece waits for what may still change: a character whose bytes have not all come, a run
of byte tokens that another may turn into U+FFFD, and the beginning of a stop string.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ic.inference.engine.request import Sampling
from ic.model.byte_tokenizer import ByteTokenizer

# How sentencepiece spells a byte of a character that has no token.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"


class _Decoder(Protocol):
    """Text of tokens that come one after the other."""

    def push(self, token_id: int) -> str:
        """One more token -> the text that is certain now."""

    def finish(self) -> str:
        """The text that was waiting for more tokens."""


class Detokenizers:
    """Makes a `Detokenizer` for each request; what they know of the tokenizer is made once.

    Args:
        tokenizer: ours of bytes, or one of Hugging Face.
        end_token_ids: tokens that end an answer, of the tokenizer and the model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Iterable[int] = ()
    ) -> None:
        self._ends = frozenset(end_token_ids)
        self._new_decoder = _decoder_of(tokenizer)

    def begin(self, sampling: Sampling) -> Detokenizer:
        """For one answer."""
        own = frozenset() if sampling.ignore_end else self._ends
        return Detokenizer(self._new_decoder(), sampling.stop, own | set(sampling.stop_token_ids))


class Detokenizer:
    """The text of one answer.

    Attributes:
        stopped: whether a stop string or an end token has come. The text is complete then.
    """

    def __init__(self, decoder: _Decoder, stop: tuple[str, ...], ends: frozenset[int]) -> None:
        self.stopped = False
        self._decoder = decoder
        self._stop = stop
        self._longest_beginning = max(map(len, stop), default=1) - 1
        self._ends = ends
        self._held = ""

    def push(self, token_id: int) -> str:
        """One more token -> the text to show. An end token and a stop string have none.

        Of several stop strings the one counts that is complete first, so that it does not matter
        how the text is cut into tokens.
        """
        assert not self.stopped, "the answer has ended"
        if token_id in self._ends:
            text = self.finish()
            self.stopped = True
            return text
        return self._up_to_stop(self._decoder.push(token_id))

    def finish(self) -> str:
        """No token comes any more -> the text that was waiting."""
        text = self._up_to_stop(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _up_to_stop(self, text: str) -> str:
        if not self._stop or not text:
            return text
        held = self._held + text
        found = [
            (place + len(stop), place) for stop in self._stop if (place := held.find(stop)) >= 0
        ]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        length = min(len(held), self._longest_beginning)
        while length and not any(stop.startswith(held[-length:]) for stop in self._stop):
            length -= 1
        self._held = held[len(held) - length :]
        return held[: len(held) - length]


def _decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[], _Decoder]:
    tokenizers_own: Any = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(tokenizer, ByteTokenizer) or (
        tokenizers_own is not None
        and isinstance(tokenizers_own.decoder, ByteLevel)
        and not _cleans_up(tokenizer, tokenizers_own)
    ):
        spelled = _TokenBytes(tokenizer)
        return lambda: _BytesDecoder(spelled)
    special = _special_ids(tokenizer)
    return lambda: _WindowDecoder(tokenizer, special)


def _cleans_up(tokenizer: Any, tokenizers_own: Any) -> bool:
    """Whether `decode` takes spaces out, which it does not do for BPE unless it is forced to."""
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    is_bpe = type(tokenizers_own.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces and (forced or not is_bpe))


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that `decode` leaves out."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(index for index, token in added if token.special).union(
        tokenizer.all_special_ids
    )


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token that was asked for; none of special and unknown ones."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(dict.fromkeys(_special_ids(tokenizer), b""))
        self._tokenizer = tokenizer
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = found = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> bytes:
        if isinstance(self._tokenizer, ByteTokenizer):
            if token_id < self._tokenizer.vocab_size:
                return bytes([token_id])
            return self._tokenizer.convert_ids_to_tokens(token_id).encode()
        token: str | None = self._tokenizer.backend_tokenizer.id_to_token(token_id)
        try:
            return bytes(self._bytes[character] for character in token or "")
        except KeyError:  # an added token, which is spelled as it is
            return str(token).encode()


class _BytesDecoder:
    """For tokens that stand for bytes: no token changes what those before it mean."""

    def __init__(self, spelled: _TokenBytes) -> None:
        self._spelled = spelled
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._characters.decode(self._spelled[token_id])

    def finish(self) -> str:
        return self._characters.decode(b"", final=True)


class _WindowDecoder:
    """For any tokenizer: decodes the last tokens with and without the new ones.

    The tokens in front are those of the last piece. They tell whether a word begins with a space.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._tokens: list[int] = []
        self._num_shown = 0  # tokens of the last piece; those behind it wait
        self._shown = ""  # their text

    def push(self, token_id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._special:
            return ""
        self._tokens.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        del self._tokens[: self._num_shown]
        self._num_shown = len(self._tokens)
        self._shown = self._decode()
        return text

    def finish(self) -> str:
        text = self._text()
        self._tokens.clear()
        self._num_shown, self._shown = 0, ""
        return text

    def _text(self) -> str:
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
