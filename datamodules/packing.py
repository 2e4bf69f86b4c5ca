"""Documents laid end to end and cut into rows of exactly `context_length` tokens.

The rule, in full: documents follow each other in the order given; a row ends when it holds
`context_length` tokens, wherever in a document that is. A document that does not fit goes on in the
next row, so a long one fills several rows, no token is dropped and none is repeated. The part of a
document in one row (a *run*) is a sequence of its own there: attention and positions start anew
with it, and its first token is not a target, because the only tokens before it are a neighbour's.

Shapes: B rows, T tokens (`context_length`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from ic.datamodules.batch import Batch
from ic.model.labels import IGNORE_INDEX

Mark = TypeVar("Mark")


@dataclass(frozen=True)
class PackedRow(Generic[Mark]):
    """One row: its runs, and how far into the documents it reaches.

    Attributes:
        runs: token arrays (tokens, ...), in order; together at most T tokens.
        mark: whatever came with the document that the last run belongs to.
        num_used_tokens: tokens of that document used so far, over all rows.
    """

    runs: list[np.ndarray]
    mark: Mark
    num_used_tokens: int


def pack_documents(
    documents: Iterable[tuple[Mark, np.ndarray]], context_length: int, num_used_tokens: int = 0
) -> Iterator[PackedRow[Mark]]:
    """Rows of exactly `context_length` tokens; only the last, if documents end, may be shorter.

    To go on after a row, give the documents from `row.mark` on (that document included) and
    `row.num_used_tokens`.

    Args:
        documents: pairs of a mark and the document's tokens (tokens, ...).
        context_length: tokens of a row.
        num_used_tokens: tokens to leave out at the start of the first document.
    """
    runs: list[np.ndarray] = []
    room = context_length
    start = num_used_tokens
    mark: Mark
    for mark, tokens in documents:
        while start < len(tokens):
            run = tokens[start : start + room]
            runs.append(run)
            start += len(run)
            room -= len(run)
            if room == 0:
                yield PackedRow(runs, mark, start)
                runs, room = [], context_length
        end, start = start, 0
    if runs:
        yield PackedRow(runs, mark, end)


def pack_whole(lengths: list[int], context_length: int, open_rows: int = 64) -> list[list[int]]:
    """Pieces that must not be cut -> rows of at most `context_length` tokens, as their indices.

    Each piece goes to the fullest of the `open_rows` latest rows that still has room for it, so a
    row's pieces lie close together in the order given. Rows come in the order in which they began.

    Raises:
        ValueError: a piece is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if length > context_length:
            raise ValueError(f"piece {index} has {length} tokens, a row {context_length}")
        first = max(0, len(rows) - open_rows)
        fitting = [row for row in range(first, len(rows)) if room[row] >= length]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            row = len(rows)
            rows.append([])
            room.append(context_length)
        rows[row].append(index)
        room[row] -= length
    return rows


def collate_rows(rows: list[list[np.ndarray]], context_length: int, pad_token_id: int) -> Batch:
    """A batch from the runs of its rows; a short row is filled with padding, a run of its own.

    Returns:
        `input_ids`, `labels`, `position_ids` (B, T) int64 and `document_ids` (B, T) int32.
    """
    shape = (len(rows), context_length)
    input_ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids_BT = np.zeros(shape, dtype=np.int64)
    document_ids_BT = np.zeros(shape, dtype=np.int32)
    for row, runs in enumerate(rows):
        start = 0
        for number, run in enumerate(runs):
            end = start + len(run)
            input_ids_BT[row, start:end] = run
            labels_BT[row, start + 1 : end] = run[1:]
            position_ids_BT[row, start:end] = np.arange(len(run))
            document_ids_BT[row, start:end] = number
            start = end
        position_ids_BT[row, start:] = np.arange(context_length - start)
        document_ids_BT[row, start:] = len(runs)
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "labels": torch.from_numpy(labels_BT),
        "position_ids": torch.from_numpy(position_ids_BT),
        "document_ids": torch.from_numpy(document_ids_BT),
    }


def collate_text(rows: list[list[np.ndarray]], context_length: int, pad_token_id: int) -> Batch:
    """`collate_rows` of runs (tokens, 2), each token with the bytes of text that it stands for.

    Returns:
        also `token_bytes` (B, T) int32, 0 for padding.
    """
    ids = [[run[:, 0] for run in runs] for runs in rows]
    token_bytes_BT = np.zeros((len(rows), context_length), dtype=np.int32)
    for row, runs in enumerate(rows):
        if runs:
            counts = np.concatenate([run[:, 1] for run in runs])
            token_bytes_BT[row, : len(counts)] = counts
    return {
        **collate_rows(ids, context_length, pad_token_id),
        "token_bytes": torch.from_numpy(token_bytes_BT),
    }


def cut_rows(batch: Batch, context_length: int) -> Batch:
    """The same tokens as rows of `context_length`, a divisor of T: (B, T) -> (B * T / t, t).

    Gives what packing into rows of t would have given, so a curriculum over lengths can change t
    without touching what was read or fetched ahead. Other entries of the batch stay as they are.

    Raises:
        ValueError: T is not a multiple of `context_length`.
    """
    T = batch["input_ids"].shape[1]
    if T % context_length:
        raise ValueError(
            f"cannot cut rows of {T} tokens into rows of {context_length}: "
            f"choose a length that divides {T}"
        )
    if context_length == T:
        return batch
    input_ids, labels, positions, documents = (
        tensor.reshape(-1, context_length)
        for tensor in (
            batch["input_ids"],
            batch["labels"],
            batch["position_ids"],
            batch["document_ids"],
        )
    )
    # A run that is cut starts anew: its positions are counted from its first token in this row.
    starts_run = torch.ones_like(documents, dtype=torch.bool)
    starts_run[:, 1:] = documents[:, 1:] != documents[:, :-1]
    index = torch.arange(context_length).expand_as(documents)
    run_start = torch.where(starts_run, index, 0).cummax(dim=1).values
    counts = batch.get("token_bytes")
    extra: Any = {} if counts is None else {"token_bytes": counts.reshape(-1, context_length)}
    return {
        **batch,
        **extra,
        "input_ids": input_ids,
        "labels": labels.masked_fill(starts_run, IGNORE_INDEX),
        "position_ids": (index - run_start).to(positions.dtype),
        "document_ids": documents - documents[:, :1],
    }
