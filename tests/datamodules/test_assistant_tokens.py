"""The assistant's tokens in templates that do not mark them, beside the same that do."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ic.datamodules.assistant_tokens import marks_assistant
from ic.datamodules.chat_templates import set_chat_template, stop_tokens
from ic.datamodules.conversations import apply_template
from ic.datamodules.options import SFTDataOptions
from ic.datamodules.sft import tokenize_conversation
from ic.model.byte_tokenizer import CHAT_TEMPLATE, ByteTokenizer
from tests.datamodules.test_retrieval_data import bpe

# SmolLM2's, as its files have it.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's: turns are trimmed.
TRIMMED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + (m['content'] | trim) + '<|im_end|>' }}"
    "{% endfor %}"
)
# As Mistral's: the end comes behind the assistant's turns alone, here behind the last alone.
ENDS_ONCE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}"
    "{% endfor %}"
)
WITHOUT_MARKS = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is the Zürich code?  "},
    {"role": "assistant", "content": "It is 4711, as Zoë said.\n"},
    {"role": "user", "content": "And what is its end?"},
    {"role": "assistant", "content": "11. What is the Zürich code?"},
]


def tokenizer_of(template: str) -> PreTrainedTokenizerBase:
    tokenizer = deepcopy(bpe())
    set_chat_template(tokenizer, "chatml")
    tokenizer.add_special_tokens({"eos_token": "<|end of text|>"})
    tokenizer.chat_template = template
    return tokenizer


def written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[str]:
    """The runs of tokens that are the assistant's, as text."""
    ids, mask = apply_template(tokenizer, messages, "here", mask=True)
    assert ids == list(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
    runs, before = [], 0
    for index, marked in zip(ids, mask, strict=True):
        runs += [[]] if marked and not before else []
        if marked:
            runs[-1].append(index)
        before = marked
    return [str(tokenizer.decode(run)) for run in runs]


@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[1:4]])
def test_the_same_tokens_as_in_a_template_that_marks_them(chat: list[dict[str, Any]]) -> None:
    marking, plain = deepcopy(bpe()), tokenizer_of(SMOLLM2)
    set_chat_template(marking, "chatml")
    assert marks_assistant(marking)
    assert not marks_assistant(plain)
    runs = written(plain, chat)
    assert runs == written(marking, chat)
    assert runs[0] == "It is 4711, as Zoë said.\n<|im_end|>"


def test_bytes_too() -> None:
    marking, plain = ByteTokenizer(), ByteTokenizer(chat_template=WITHOUT_MARKS)
    assert not marks_assistant(plain)
    for chat in (CHAT, CHAT[1:4]):
        assert apply_template(plain, chat, "here", mask=True) == apply_template(
            marking, chat, "here", mask=True
        )


def test_templates_that_trim_or_end_the_last_turn_alone() -> None:
    assert written(tokenizer_of(TRIMMED), CHAT) == [
        "It is 4711, as Zoë said.<|im_end|>",
        "11. What is the Zürich code?<|im_end|>",
    ]
    # The space before an answer is part of its first token in a tokenizer of words.
    runs = written(tokenizer_of(ENDS_ONCE), CHAT[1:])
    assert [run.strip() for run in runs] == [
        "It is 4711, as Zoë said.",
        "11. What is the Zürich code?<|end of text|>",
    ]


def test_refuses_a_template_that_changes_what_is_said() -> None:
    shouting = SMOLLM2.replace("message['content']", "(message['content'] | upper)")
    with pytest.raises(ValueError, match=r"row 3: the tokenizer's chat template writes something"):
        apply_template(tokenizer_of(shouting), CHAT, "row 3", mask=True)
    once = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="cannot be told; put {% generation %}"):
        apply_template(tokenizer_of(once), CHAT, "row 3", mask=True)


def test_sft_trains_on_what_smollm2_would_write_and_generation_stops_there() -> None:
    tokenizer = tokenizer_of(SMOLLM2)
    row = tokenize_conversation(tokenizer, {"messages": CHAT[1:3]}, "here", SFTDataOptions())
    targets = [int(token) for token in row.tokens[row.is_target]]
    assert tokenizer.decode(targets) == "It is 4711, as Zoë said.\n<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert targets[-1] == end
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id, end]
