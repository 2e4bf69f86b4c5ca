"""Sequences of text and of conversations to measure a model on, from the user's files.

Legend: M rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.conversion.options import ConvertOptions
from ic.datamodules.conversations import (
    apply_template,
    check_template,
    column_of,
    messages_of,
    read_records,
)
from ic.datamodules.text_files import TextFiles, detect_format, expand_folders, resolve_files
from ic.errors import UsageError
from ic.evaluation.framing import encode, frame_prompt

# Read of one document, in characters per token of a row: enough for a few rows.
_CHARACTERS_PER_TOKEN = 32


class CalibrationOptions(Protocol):
    """What is asked of the text, as `ConvertOptions` says."""

    calibration: list[str]
    calibration_rows: int
    calibration_tokens: int
    format: str
    text_column: str


def open_texts(options: CalibrationOptions) -> TextFiles:
    """The files of `calibration`, found and their format known, not read.

    Raises:
        ValueError: none are given, or a file is not there, empty or of no known format.
    """
    setting = "calibration"
    if not options.calibration:
        raise UsageError(
            "calibration is empty: name files of text such as the model will read, which tells "
            "what a smaller cache may leave out (the exact form, without rank and cache, needs "
            "none)"
        )
    paths = resolve_files(expand_folders(options.calibration, setting), setting)
    file_format = detect_format(paths, options.format, setting, "")
    return TextFiles(paths, file_format, options.text_column, "file", "")


def calibration_rows(tokenizer: PreTrainedTokenizerBase, options: ConvertOptions) -> Tensor:
    """`calibration_rows` sequences of `calibration_tokens` token ids, (M, T) int64: of text, of
    conversations, or of text and then as many or one fewer of conversations.

    Raises:
        ValueError: no files are given, they hold too little, or cannot be read.
    """
    rows = options.calibration_rows
    if not options.calibration_chats:
        return read_rows(open_texts(options), tokenizer, options)
    if not options.calibration:
        return read_chats(tokenizer, options, rows)
    if rows < 2:
        raise UsageError(
            f"calibration_rows={rows}: calibration and calibration_chats share the rows, so at "
            "least 2; or leave one of them out"
        )
    chats = read_chats(tokenizer, options, rows // 2)
    return torch.cat((read_rows(open_texts(options), tokenizer, options, -(-rows // 2)), chats))


def read_chats(tokenizer: PreTrainedTokenizerBase, options: ConvertOptions, rows: int) -> Tensor:
    """Sequences of `calibration_tokens` token ids, (M, T) int64, each of whole conversations in the
    tokenizer's chat template and the beginning of one more.

    Raises:
        ValueError: a tokenizer without a chat template, a row that is no conversation, or too few
            of them.
    """
    setting, tokens = "calibration_chats", options.calibration_tokens
    check_template(tokenizer, setting)
    found: list[list[int]] = []
    joined: list[int] = []
    seen = 0
    for where, record in read_records(options.calibration_chats, "train_files", setting):
        messages = messages_of(column_of(record, "messages", where), where, "messages")
        ids, _ = apply_template(tokenizer, messages, where)
        seen += len(ids)
        joined += ids
        if len(joined) >= tokens:
            # The next row begins with the next conversation.
            found.append(joined[:tokens])
            joined = []
        if len(found) == rows:
            return torch.tensor(found)
    raise UsageError(
        f"{setting}: the conversations hold {seen:,} tokens and fill {len(found)} of {rows} rows "
        f"of calibration_tokens={tokens}, each of which begins with a conversation; give more of "
        "them, or fewer or shorter rows (calibration_rows, calibration_tokens)"
    )


def read_rows(
    texts: TextFiles,
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    rows: int | None = None,
) -> Tensor:
    """Sequences of text of `calibration_tokens` token ids, (M, T) int64.

    One from the middle of each long document first, then their other parts; what is shorter is
    joined. Each row begins with the tokenizer's own first token, if it adds one.

    Args:
        rows: how many; by default `calibration_rows`.

    Raises:
        ValueError: the files hold too little text, or cannot be read.
    """
    first = torch.as_tensor(frame_prompt(tokenizer, "plain").before)
    rows, tokens = rows or options.calibration_rows, options.calibration_tokens
    own = tokens - len(first)
    if own < 1:
        raise UsageError(
            f"calibration_tokens={tokens}: must be more than {len(first)}, which the tokenizer "
            "puts before every text"
        )
    # A piece from the middle of each document; where that is too little, as of a single book, a
    # piece that would do alone.
    for piece in (own, own * rows):
        by_round, seen = _read_pieces(texts, tokenizer, own, rows, piece * _CHARACTERS_PER_TOKEN)
        if sum(map(len, by_round)) >= rows:
            break
    else:
        raise UsageError(
            f"calibration: the files hold {seen:,} tokens, and {rows} rows of "
            f"calibration_tokens={tokens} are {rows * tokens:,}; give more text, or fewer or "
            f"shorter rows (calibration_rows; first file: {texts.files[0]})"
        )
    chosen = [row for turn in by_round for row in turn][:rows]
    return torch.stack([torch.cat((first, row)) for row in chosen])


def _read_pieces(
    texts: TextFiles, tokenizer: PreTrainedTokenizerBase, own: int, rows: int, characters: int
) -> tuple[list[list[Tensor]], int]:
    """Rows of `own` tokens: a list of each document's first, then one of the second ones and so on;
    and how many tokens were read. Reading ends with the document that fills the first list.
    """
    by_round: list[list[Tensor]] = []
    joined = torch.empty(0, dtype=torch.long)
    seen = 0
    for text in _documents(texts):
        start = max(0, len(text) - characters) // 2
        ids = torch.as_tensor(encode(tokenizer, text[start : start + characters]))
        seen += len(ids)
        whole = len(ids) // own * own
        joined = torch.cat((joined, ids[whole:]))
        found = list(ids[:whole].split(own)) if whole else []
        if len(joined) >= own:
            found.append(joined[:own])
            joined = joined[own:]
        for turn, row in enumerate(found):
            by_round += [[]] if turn == len(by_round) else []
            by_round[turn].append(row)
        if by_round and len(by_round[0]) >= rows:
            break
    return by_round, seen


def _documents(texts: TextFiles) -> Iterator[str]:
    for index in range(len(texts)):
        for _, text in texts.documents(index):
            yield text
