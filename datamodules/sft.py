"""Supervised fine-tuning on conversations: loss on what the assistant writes, whole conversations
packed into rows.

`document_ids` separates conversations, and padding is a document of its own. Unlike documents of
text, a conversation is never cut to fill a row: an answer apart from its question teaches nothing.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from ic.datamodules.accumulation import take_lookahead, with_lookahead
from ic.datamodules.batch import Batch
from ic.datamodules.conversations import (
    Record,
    apply_template,
    check_template,
    column_of,
    messages_of,
    prompt_and_completions,
    read_records,
)
from ic.datamodules.epochs import EpochDataModule
from ic.datamodules.needle_rows import NeedleRows
from ic.datamodules.options import SFTDataOptions
from ic.datamodules.packing import collate_rows, pack_whole
from ic.model.labels import IGNORE_INDEX


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids (n,) int32, and which of them are targets (n,) bool."""

    tokens: np.ndarray
    is_target: np.ndarray
    where: str

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, record: Record, where: str, config: SFTDataOptions
) -> TokenizedConversation:
    """A row of the data as tokens: targets are the assistant's, or the completion's.

    Raises:
        ValueError: a missing column, an empty completion, a chat template in which the assistant's
            tokens cannot be told; names the row.
    """
    if record.get(config.messages_column) is not None:
        messages = messages_of(record[config.messages_column], where, config.messages_column)
        check_template(tokenizer, where)
        if not any(message["role"] == "assistant" and message["content"] for message in messages):
            raise ValueError(f"{where}: the assistant writes nothing in this conversation")
        ids, mask = apply_template(tokenizer, messages, where, mask=True)
    else:
        if config.prompt_column not in record:
            raise ValueError(
                f'{where}: neither "{config.messages_column}" nor "{config.prompt_column}"; the '
                f"columns are {', '.join(record) or 'none'}"
            )
        prompt, (completion,) = prompt_and_completions(
            tokenizer,
            column_of(record, config.prompt_column, where),
            {config.completion_column: column_of(record, config.completion_column, where)},
            where,
        )
        ids, mask = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    is_target = np.asarray(mask, dtype=bool)
    if not is_target[1:].any():
        raise ValueError(f"{where}: no token of this conversation is the assistant's")
    return TokenizedConversation(np.asarray(ids, dtype=np.int32), is_target, where)


def collate_conversations(
    rows: list[list[TokenizedConversation]],
    pad_token_id: int,
    context_length: int | None = None,
    length_multiple: int = 1,
) -> Batch:
    """A batch of rows, each of conversations one after the other.

    Args:
        context_length: tokens of each row; the longest row's if None.
        length_multiple: what the longest row's are then rounded up to a multiple of.

    Returns:
        `input_ids`, `labels`, `position_ids` (B, T) int64 and `document_ids` (B, T) int32.
    """
    longest = max(sum(map(len, row)) for row in rows)
    length = context_length or -(-longest // length_multiple) * length_multiple
    batch = collate_rows([[part.tokens for part in row] for row in rows], length, pad_token_id)
    for labels_T, row in zip(batch["labels"], rows, strict=True):
        is_target = torch.from_numpy(np.concatenate([part.is_target for part in row]))
        labels_T[: len(is_target)].masked_fill_(~is_target, IGNORE_INDEX)
    return batch


class SFTDataModule(EpochDataModule[SFTDataOptions, TokenizedConversation, list[int]]):
    """Conversations, one or more a row of `EpochDataModule`."""

    example_name = "conversation"
    file_example = "chats.jsonl"
    other_data_error = (
        "data: the checkpoint was trained on other conversations, or on rows of another "
        "context_length, packing or seed; set them back, or begin a new run from its "
        "weights with model.init_from"
    )

    @cached_property
    def generated(self) -> NeedleRows | None:
        return NeedleRows(self.config, self.tokenizer) if self.config.needle_fraction else None

    @property
    def packed(self) -> bool:
        return self.config.packing

    def check_files(self) -> None:
        super().check_files()
        self.generated  # noqa: B018  its files are read here

    def train_dataloader(self) -> Iterable[Batch]:
        return with_lookahead(super().train_dataloader(), self.trainer)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if "place" in batch and self.trainer is not None:
            batch = take_lookahead(batch, self.trainer, lambda prepared: prepared)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def _read(self, setting: str) -> list[TokenizedConversation]:
        limit, rule = self.config.context_length, self.config.too_long
        kept: list[TokenizedConversation] = []
        changed: list[str] = []
        total = 0
        for where, record in read_records(getattr(self.config, setting), setting):
            total += 1
            conversation = tokenize_conversation(self.tokenizer, record, where, self.config)
            if len(conversation) <= limit:
                kept.append(conversation)
                continue
            if rule == "error":
                raise ValueError(
                    f"{where}: {len(conversation)} tokens, more than data.context_length={limit}; "
                    "raise it, or set data.too_long to drop or split"
                )
            changed.append(where)
            if rule == "split":
                kept += _pieces(conversation, limit)
        if changed:
            what = "dropped" if rule == "drop" else "split"
            rank_zero_info(
                f"data.{setting}: {what} {len(changed)} of {total} conversations longer than "
                f"{limit} tokens, the first is {changed[0]}"
            )
        if not kept and getattr(self.config, setting):
            raise ValueError(f"data.{setting}: no conversations to use")
        return kept

    def _sizes(self) -> tuple[int, int]:
        conversations = self.examples("train_files")
        # One that was split is still one.
        return len({each.where for each in conversations}), sum(map(len, conversations))

    def _rows(self, setting: str, order: list[int]) -> list[list[int]]:
        if not self.packed:
            return [[index] for index in order]
        conversations = self.examples(setting)
        lengths = [len(conversations[index]) for index in order]
        packed = pack_whole(lengths, self.config.context_length)
        return [[order[place] for place in row] for row in packed]

    def _collate(self, rows: list[list[int]], setting: str = "train_files") -> Batch:
        conversations = self.examples(setting)
        return collate_conversations(
            [[conversations[index] for index in row] for row in rows],
            int(self.tokenizer.pad_token_id or 0),
            self.config.context_length if self.packed else None,
            self.length_multiple,
        )

    def _uncounted(self, batch: Batch, num_rows: int) -> Batch:
        labels = batch["labels"].clone()
        labels[-num_rows:] = IGNORE_INDEX
        return {**batch, "labels": labels}

    def _digest(self) -> str:
        digest = hashlib.sha256(
            repr((self.config.context_length, self.config.packing, self.config.seed)).encode()
        )
        for conversation in self.examples("train_files"):
            digest.update(conversation.tokens.tobytes() + conversation.is_target.tobytes())
        return digest.hexdigest()[:16]


def _pieces(conversation: TokenizedConversation, limit: int) -> list[TokenizedConversation]:
    """Parts of at most `limit` tokens; those without a target teach nothing and are left out."""
    parts = [
        TokenizedConversation(
            conversation.tokens[start : start + limit],
            conversation.is_target[start : start + limit],
            conversation.where,
        )
        for start in range(0, len(conversation), limit)
    ]
    return [part for part in parts if part.is_target[1:].any()]
