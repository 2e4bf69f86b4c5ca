"""Where a user's turn ends, and marks of the template in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.user_turns import UserTurns
from ic.inference.chats.writer import ChatWriter
from ic.inference.loading import Loaded
from ic.model.byte_tokenizer import ByteTokenizer
from tests.inference.chats.writers import END, llama, written


@pytest.mark.parametrize(
    ("user", "assistant", "end", "end_text", "begin"),
    [
        ("'User: ' + message['content'] + '\n\n'", "'Assistant: '", None, "Assistant:", "User:"),
        ("'<|user|>' + message['content']", "'<|assistant|>'", 261, "", "<|user|>"),
        ("'[INST] ' + message['content'] + ' [/INST]'", "''", None, "[/INST]", "[INST]"),
        (
            "'<|user|>\n' + message['content'] + '<|end|>\n'",
            "'<|assistant|>\n'",
            END,
            "",
            "<|user|>\n",
        ),
    ],
    ids=["DeepSeek-V2", "DeepSeek-V3", "Mistral", "ChatML"],
)
def test_where_a_users_turn_ends(
    user: str, assistant: str, end: int | None, end_text: str, begin: str
) -> None:
    tokenizer = written(user, assistant)
    turns = UserTurns.of(tokenizer, MakeChatsOptions())
    assert (turns.end, turns.end_text) == (end, end_text)
    assert tokenizer.decode(turns.prompt([])) == begin


def test_a_template_that_does_not_end_a_users_turn_is_refused() -> None:
    tokenizer = written("'> ' + message['content'] + '\n'", "''")
    with pytest.raises(ValueError, match="writes nothing between what a user says and the answer"):
        UserTurns.of(tokenizer, MakeChatsOptions())


def test_a_template_without_a_token_at_the_end_of_a_users_turn() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}"
        "{%- else -%}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- endif -%}{%- endfor -%}"
    )
    turns = UserTurns.of(tokenizer, MakeChatsOptions())
    assert (turns.end, turns.end_text) == (None, "[/INST]")
    assert tokenizer.decode(turns.prompt([])) == "[INST]"
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "'[INST] ' +", "message['content'] +"
    )
    with pytest.raises(ValueError, match="writes what a user says 2 times"):
        UserTurns.of(tokenizer, MakeChatsOptions())


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([97, 98, END], ("ab", "")),
        ([97, 259, 98, END], ("a<|system|>b", "question with marks of the template in it")),
        ([97, 264, 98, END], ("a<|added|>b", "question with marks of the template in it")),
        ([*b"a<|added|>", END], ("a<|added|>", "question with marks of the template in it")),
        ([*b"a<|eos|>b", END], ("a<|eos|>b", "question with marks of the template in it")),
        ([97, 263, 98, END], ("a\n\nb", "")),
        ([97, 98], ("ab", "unfinished question")),
    ],
)
def test_marks_in_a_turn(writer: Path, ids: list[int], found: tuple[str, str]) -> None:
    """Those of the template, whichever way they are written; not ends of lines that were added."""
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["\n\n", "<|added|>"])
    assert not {263, 264}.intersection(tokenizer.all_special_ids)
    options = MakeChatsOptions()
    loaded = Loaded(llama(), tokenizer, "tiny", None, writer)
    turns = UserTurns.of(tokenizer, options)
    made = ChatWriter(loaded, turns, options, lambda who, number, limit: None)
    assert made._text(ids, "question") == found


def test_what_follows_a_textual_end_is_not_looked_at(writer: Path) -> None:
    tokenizer = written("'User: ' + message['content'] + '\n\n'", "'Assistant: '")
    options = MakeChatsOptions()
    loaded = Loaded(llama(), tokenizer, "tiny", None, writer)
    turns = UserTurns.of(tokenizer, options)
    made = ChatWriter(loaded, turns, options, lambda who, number, limit: None)
    assert made._text([*b" Why?\n\nAssistant: B", 259], "question") == ("Why?", "")
