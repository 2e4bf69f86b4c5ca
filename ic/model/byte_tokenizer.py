"""A byte-level tokenizer: token n is byte n, and a few special tokens follow.

It needs no vocabulary file that was trained on anything, so synthetic tasks start from random
weights alone.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import render_jinja_template

from ic.files.atomic_write import write_json
from ic.model.assistant_mask import assistant_mask, token_starts
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

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers', which has the assistant's mask for other kinds of tokenizer alone.

        With `return_assistant_tokens_mask`, `assistant_masks` is 1 where a token belongs to a
        generation block of the template, and has the form of `input_ids`.

        Raises:
            ValueError: the mask is asked for with what it does not go with.
        """
        encode = super().apply_chat_template
        if not return_assistant_tokens_mask:
            return encode(conversation, *args, **kwargs)
        bound = inspect.signature(encode).bind(conversation, *args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        if not (asked["tokenize"] and asked["return_dict"]):
            raise ValueError(
                "return_assistant_tokens_mask=True goes with tokenize=True and return_dict=True"
            )
        if asked["continue_final_message"] or asked.get("sanitize_control_tokens"):
            raise ValueError(
                "return_assistant_tokens_mask=True goes with neither continue_final_message nor "
                "sanitize_control_tokens"
            )
        encoding: Any = encode(conversation, *args, **kwargs)
        first = conversation[0]
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = conversation if is_batched else [conversation]
        rendered: Any = render_jinja_template(  # annotated as text alone
            conversations=[_without_none(getattr(chat, "messages", chat)) for chat in chats],
            tools=asked["tools"],
            documents=asked["documents"],
            chat_template=self.get_chat_template(asked["chat_template"], asked["tools"]),
            return_assistant_tokens_mask=True,
            add_generation_prompt=asked["add_generation_prompt"],
            **{**self.special_tokens_map, **asked["kwargs"]},
        )
        texts, spans = rendered
        added = {index: token.content for index, token in self.added_tokens_decoder.items()}
        has_rows = is_batched or asked["return_tensors"] is not None
        attention = encoding["attention_mask"] if has_rows else [encoding["attention_mask"]]
        masks = []
        for text, blocks, row in zip(texts, spans, attention, strict=True):
            ids = self.encode(text, add_special_tokens=False, truncation=False)
            starts = token_starts(ids, text, added)
            masks.append(assistant_mask(starts, blocks, row, self.truncation_side == "left"))
        encoding["assistant_masks"] = masks if has_rows else masks[0]
        if asked["return_tensors"] is not None:
            encoding.convert_to_tensors(tensor_type=asked["return_tensors"])
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


def _without_none(messages: Any) -> list[dict[str, Any]]:
    """As transformers does before it renders them."""
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


AutoTokenizer.register(MLAConfig, slow_tokenizer_class=ByteTokenizer, exist_ok=True)
