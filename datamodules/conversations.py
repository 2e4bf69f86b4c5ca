"""Conversations and preference pairs from local files, and their tokens, in TRL's formats.

Every message names the row: `file:line` of JSON Lines, `file, row n` of parquet and of folders that
`datasets` saved; rows count from 1.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ic.datamodules.assistant_tokens import assistant_spans, assistant_tokens, marks_assistant
from ic.datamodules.compressed import READ_ERRORS, open_bytes
from ic.datamodules.json_rows import as_object, check_text, parse_row
from ic.datamodules.text_files import detect_format, resolve_files

Record = dict[str, Any]
# Files that ship with the project, in `datamodules/assets`.
BUNDLED = "bundled:"
_ASSETS = Path(__file__).parent / "assets"
_SPLITS = {"train_files": "train", "val_files": "validation", "test_files": "test"}


def read_records(
    sources: list[str], setting: str, option: str | None = None
) -> Iterator[tuple[str, Record]]:
    """Pairs of where a record stands and the record, in the order of the files.

    Args:
        sources: paths or globs of `.jsonl` and `.parquet` files, folders that
            `datasets.save_to_disk` wrote (of several splits, the one that `setting` names), or
            `bundled:NAME` for a file that comes with the project.
        setting: `train_files`, `val_files` or `test_files`, for the messages.
        option: whole name of the option that names the sources, for the messages; by default
            `setting` of `data`.

    Raises:
        ValueError: nothing there, another format, or a line that is not a JSON object.
    """
    option = option or f"data.{setting}"
    for source in sources:
        if source.startswith(BUNDLED):
            source = str(_bundled(source, setting))
        if Path(source).is_dir():
            yield from _read_folder(Path(source), setting)
            continue
        for file in resolve_files([source], option):
            kind = detect_format([file], "auto", option)
            if kind == "jsonl":
                yield from _read_jsonl(file)
            elif kind == "parquet":
                yield from _read_parquet(file)
            else:
                raise ValueError(
                    f"{option}: {file} is text; give .jsonl, .parquet or a `datasets` folder"
                )


def source_files(sources: list[str], setting: str) -> list[str]:
    """The files that `read_records` reads, for comparing what they are.

    Raises:
        ValueError: nothing there.
    """
    files: list[str] = []
    for source in sources:
        if source.startswith(BUNDLED):
            source = str(_bundled(source, setting))
        folder = Path(source)
        if folder.is_dir():
            split = folder / _SPLITS[setting]
            folder = split if split.is_dir() else folder
            files += sorted(str(path) for path in folder.glob("*.arrow"))
        else:
            files += resolve_files([source], f"data.{setting}")
    return files


def messages_of(value: Any, where: str, column: str) -> list[dict[str, Any]]:
    """A list of messages, checked: each an object with `role` and a string `content`."""
    if not isinstance(value, list) or not value:
        raise ValueError(f'{where}: "{column}" must be a list of messages, not {_short(value)}')
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'{where}: a message in "{column}" must be an object with "role" and "content", '
                f"not {_short(message)}"
            )
        if not isinstance(message.get("content"), str):
            raise ValueError(f'{where}: a message in "{column}" has no "content" of text')
        check_text(message["content"], where, column)
    return value


def column_of(record: Record, column: str, where: str) -> Any:
    """The value of a column that has to be there.

    Raises:
        ValueError: it is missing or null.
    """
    if record.get(column) is None:
        raise ValueError(f'{where}: no "{column}"; the columns are {", ".join(record) or "none"}')
    return record[column]


def is_conversation(value: Any) -> bool:
    """Whether a column holds messages rather than text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer that cannot render a conversation.

    Raises:
        ValueError: it has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: is a conversation, but the tokenizer has no chat template; set "
            "chat_template in its folder, or give text"
        )


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str,
    *,
    prompt: bool = False,
    mask: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, with `prompt` up to where the assistant begins to write; and
    with `mask` whether each is the assistant's, else nothing.

    Raises:
        ValueError: what the tokenizer's chat template refuses, such as a role, or the assistant's
            tokens cannot be told; names the row.
    """
    try:
        if mask and not marks_assistant(tokenizer):
            text, spans = assistant_spans(
                lambda some: str(tokenizer.apply_chat_template(some, tokenize=False)), messages
            )
            return assistant_tokens(tokenizer, text, spans)
        out: Any = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=mask,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        taken = ", ".join(_roles(tokenizer)) or "none that is known"
        raise ValueError(
            f"{where}: the tokenizer's chat template refuses this conversation ({error}), whose "
            f"roles are {roles}; the template takes the roles {taken}"
        ) from error
    return list(out["input_ids"]), list(out["assistant_masks"]) if mask else []


def _roles(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Which of the roles that are in use a chat template takes in their usual places."""
    usual = {
        "system": ["system", "user"],
        "developer": ["developer", "user"],
        "user": ["user"],
        "assistant": ["user", "assistant"],
        "tool": ["user", "assistant", "tool"],
    }
    found = []
    for role, roles in usual.items():
        messages = [{"role": each, "content": "a"} for each in roles]
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, ValueError):
            continue
        found.append(role)
    return found


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text, with the tokenizer's own special tokens, as TRL has it."""
    return list(tokenizer(text)["input_ids"])


def prompt_and_completions(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completions: dict[str, Any], where: str
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of what follows it in each completion, as TRL's trainers cut them.

    The prompt ends where the rendered prompt and one of the rendered whole texts part, which a
    template or a tokenizer can make earlier than the prompt's end.

    Args:
        completions: columns and their values, messages or text like the prompt.

    Raises:
        ValueError: an empty prompt or completion, or text mixed with messages.
    """
    if is_conversation(prompt):
        check_template(tokenizer, where)
        messages = messages_of(prompt, where, "prompt")
        prompt_ids, _ = apply_template(tokenizer, messages, where, prompt=True)
        wholes = []
        for column, value in completions.items():
            replies = messages_of(value, where, column)
            if not any(message["content"].strip() for message in replies):
                raise ValueError(f'{where}: "{column}" is empty')
            wholes.append(apply_template(tokenizer, messages + replies, where)[0])
    else:
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f'{where}: "prompt" must be text or messages, not {_short(prompt)}')
        check_text(prompt, where, "prompt")
        prompt_ids = text_ids(tokenizer, prompt)
        wholes = []
        for column, value in completions.items():
            if not isinstance(value, str):
                raise ValueError(f'{where}: "{column}" must be text like "prompt"')
            if not value.strip():
                raise ValueError(f'{where}: "{column}" is empty')
            check_text(value, where, column)
            eos = str(tokenizer.eos_token)
            value = value if value.endswith(eos) else value + eos
            wholes.append(text_ids(tokenizer, prompt + value))
    cut = min(common_prefix(prompt_ids, whole) for whole in wholes)
    if not cut:
        raise ValueError(f"{where}: the prompt has no token in common with prompt and completion")
    for column, whole in zip(completions, wholes, strict=True):
        if len(whole) == cut:
            raise ValueError(f'{where}: "{column}" is empty')
    return prompt_ids[:cut], [whole[cut:] for whole in wholes]


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Number of items that two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right)))  # noqa: B905


def _bundled(source: str, setting: str) -> Path:
    name = source.removeprefix(BUNDLED)
    known = sorted(path.name for path in _ASSETS.glob("*.jsonl"))
    if name not in known:
        raise ValueError(f"data.{setting}: no {source}; there are {', '.join(known)}")
    return _ASSETS / name


def _read_jsonl(file: str) -> Iterator[tuple[str, Record]]:
    try:
        with io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}:{number}"
                    wanted = "a line must be one JSON object"
                    yield where, as_object(parse_row(line, where, wanted), where, wanted)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid UTF-8 ({error.reason}); convert it") from error
    except READ_ERRORS as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error


def _read_parquet(file: str) -> Iterator[tuple[str, Record]]:
    try:
        row = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                row += 1
                yield f"{file}, row {row}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as parquet ({error})") from error


def _read_folder(folder: Path, setting: str) -> Iterator[tuple[str, Record]]:
    from datasets import DatasetDict, load_from_disk  # two seconds to import

    try:
        dataset = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"data.{setting}: {folder} is not a folder that datasets.save_to_disk wrote ({error}); "
            "name files by path or glob"
        ) from error
    if isinstance(dataset, DatasetDict):
        split = _SPLITS[setting]
        if split not in dataset:
            raise ValueError(
                f"data.{setting}: {folder} has no split {split!r}, only {', '.join(dataset)}"
            )
        dataset = dataset[split]
    for row, record in enumerate(dataset, 1):
        yield f"{folder}, row {row}", dict(record)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
