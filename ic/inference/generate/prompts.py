"""Text, messages and files -> the tokens of prompts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ic.datamodules.conversations import (
    apply_template,
    check_template,
    messages_of,
    read_records,
    text_ids,
)
from ic.datamodules.json_rows import check_text, json_type
from ic.inference.generate.options import GenerateOptions, check_utf8

# Keys of an answer, which a prompt may not have.
ANSWER_KEYS = ("text", "finish", "prompt_tokens", "tokens", "logprobs", "error", "key")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what stands beside it.

    Attributes:
        where: file and line, for messages.
        beside: what else its line holds.
    """

    ids: tuple[int, ...]
    where: str
    beside: dict[str, Any]


class PromptMaker:
    """Makes the tokens of prompts.

    Raises:
        ValueError: `chat=true`, and the tokenizer has no chat template.
    """

    def __init__(self, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        if options.chat:
            check_template(tokenizer, "chat=true")
        self._options = options
        self._tokenizer = tokenizer

    def begin(self) -> list[dict[str, Any]]:
        """The messages in front of a user's."""
        system = self._options.system
        return [] if system is None else [{"role": "system", "content": system}]

    def of_messages(self, messages: list[dict[str, Any]], where: str) -> tuple[int, ...]:
        """Up to where the assistant begins to write."""
        return tuple(apply_template(self._tokenizer, messages, where, prompt=True)[0])

    def of_text(self, text: str, where: str) -> tuple[int, ...]:
        """Text to continue, or a user's message."""
        if not text:
            raise ValueError(f"{where} is empty: give at least one character")
        if self._options.chat:
            messages = [*self.begin(), {"role": "user", "content": text}]
            return self.of_messages(messages, "chat=true")
        ids = tuple(text_ids(self._tokenizer, text))
        if not ids:
            raise ValueError(f"{where}: the tokenizer makes no token of {text[:40]!r}")
        return ids

    def single(self) -> Prompt:
        """The one prompt that is asked for.

        Raises:
            ValueError: it is empty, or no text.
            OSError: its file cannot be read.
        """
        options = self._options
        if options.prompt_file is None:
            text = _standard_input() if options.prompt == "-" else options.prompt
            return Prompt(self.of_text(text, "prompt"), "prompt", {})
        where = f"prompt_file={options.prompt_file!r}"
        try:
            text = Path(options.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not valid UTF-8 ({error.reason}); convert it") from error
        return Prompt(self.of_text(text, where), where, {})

    def of_lines(self, file: str) -> list[Prompt]:
        """The prompts of a file of JSON lines.

        Raises:
            ValueError: there is none, or a line that holds none; names the line.
        """
        if not Path(file).is_file():
            raise ValueError(f"prompt_file={file!r}: no such file")
        records = read_records([file], "prompt_file", "prompt_file")
        found = [self._of_line(where, dict(row)) for where, row in records]
        if not found:
            raise ValueError(f"prompt_file={file!r}: holds no prompt")
        return found

    def _of_line(self, where: str, row: dict[str, Any]) -> Prompt:
        if ("prompt" in row) == ("messages" in row):
            raise ValueError(
                f'{where}: a line must have "prompt" (text) or "messages" (a conversation), one of '
                f"the two; its keys are {', '.join(row) or 'none'}"
            )
        if taken := [key for key in ANSWER_KEYS if key in row]:
            raise ValueError(f'{where}: "{taken[0]}" is a key of the answer: name it otherwise')
        if "messages" in row:
            check_template(self._tokenizer, where)
            messages = messages_of(row.pop("messages"), where, "messages")
            return Prompt(self.of_messages(messages, where), where, row)
        text = row.pop("prompt")
        if not isinstance(text, str):
            raise ValueError(f'{where}: "prompt" is {json_type(text)}; it must be text')
        check_text(text, where, "prompt")
        return Prompt(self.of_text(text, where), where, row)


def _standard_input() -> str:
    """Raises:
    ValueError: it is no text.
    """
    where = "prompt=-: standard input"
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason}); convert it") from error
    check_utf8(where, text)
    return text
