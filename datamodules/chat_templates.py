"""Chat templates to choose from, each with the special tokens that it writes.

Both mark what the assistant writes with `{% generation %}`, which SFT needs, and both end its turns
with a token at which `generate` stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ic.model.byte_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and its tokens beside bos, eos and pad."""

    text: str
    tokens: tuple[str, ...]


# As OpenAI published it and Qwen uses it: any role, a line break behind each turn.
_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# The names stand in `ic.datamodules.options.CHAT_TEMPLATES` too, which imports no library.
TEMPLATES = {
    "ic": ChatTemplate(CHAT_TEMPLATE, SPECIAL_TOKENS[3:]),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>")),
}
# What ends an assistant's turn in well-known templates, where it is not eos.
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer a chat template, and the special tokens that it lacks for it.

    Args:
        name: a key of `TEMPLATES`, or a file that holds a Jinja template, whose special tokens the
            tokenizer must have.

    Raises:
        ValueError: neither.
    """
    if name not in TEMPLATES:
        if not Path(name).is_file():
            raise ValueError(
                f"chat_template={name!r}: choose from {', '.join(TEMPLATES)}, or name a file that "
                "holds a Jinja template"
            )
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
        return
    template = TEMPLATES[name]
    known = tokenizer.get_vocab()
    if missing := [token for token in template.tokens if token not in known]:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": missing}, replace_extra_special_tokens=False
        )
    tokenizer.chat_template = template.text


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which a reply ends: eos, and what ends a turn in the tokenizer's chat template."""
    template, known = str(tokenizer.chat_template), tokenizer.get_vocab()
    ends = [known[end] for end in _ENDS_OF_TURN if end in template and end in known]
    return [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *ends]
