"""Supervised fine-tuning on conversations: loss on what the assistant writes, whole conversations
packed into rows.

Batches follow the contract of `ic.datamodules.passkey`; `document_ids` separates conversations, and
padding is a document of its own. Unlike documents of text, a conversation is never cut to fill a
row: an answer apart from its question teaches nothing.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ic.datamodules.accumulation import take_lookahead, with_lookahead
from ic.datamodules.conversations import (
    Record,
    check_template,
    column_of,
    messages_of,
    prompt_and_completions,
    read_records,
)
from ic.datamodules.epochs import EpochBatches, Place
from ic.datamodules.packing import IGNORED_LABEL, pack_whole
from ic.parallel.replica import data_replica

Batch = dict[str, Any]
TOO_LONG = ("error", "drop", "split")


@dataclass
class SFTDataConfig:
    """Configuration of `SFTDataModule`.

    Attributes:
        train_files, val_files, test_files: paths or globs of `.jsonl` and `.parquet`, folders
            that `datasets` saved, or `bundled:NAME`.
        messages_column: conversations; where a row lacks it, `prompt_column` and
            `completion_column` hold text or messages.
        context_length: most tokens of a row.
        tokens_per_batch: tokens of a micro-batch and rank, a multiple of `context_length`.
        packing: several conversations a row, each attending to itself; otherwise one a row.
        too_long: what to do with a conversation beyond the context: `error`, or `drop` it, or
            `split` it into rows that do not see each other; both are counted and reported.
        shuffle: another order each epoch.
        num_workers: processes that make batches ahead; the batches do not depend on it.
    """

    name: str = "sft"
    train_files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    test_files: list[str] = field(default_factory=list)
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    context_length: int = 2048
    tokens_per_batch: int = 4096
    packing: bool = True
    too_long: str = "error"
    shuffle: bool = True
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ValueError(f"data.too_long={self.too_long!r}: choose from {', '.join(TOO_LONG)}")
        if self.context_length < 2:
            raise ValueError(f"data.context_length={self.context_length}: must be at least 2")
        if self.tokens_per_batch < 1 or self.tokens_per_batch % self.context_length:
            raise ValueError(
                f"data.tokens_per_batch={self.tokens_per_batch}: must be a multiple of "
                f"data.context_length={self.context_length}"
            )
        for name in ("num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 0")

    @property
    def rows_per_batch(self) -> int:
        return self.tokens_per_batch // self.context_length


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids (n,) int32, and which of them are targets (n,) bool."""

    tokens: np.ndarray
    is_target: np.ndarray
    where: str

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, record: Record, where: str, config: SFTDataConfig
) -> TokenizedConversation:
    """A row of the data as tokens: targets are the assistant's, or the completion's.

    Raises:
        ValueError: a missing column, an empty completion, a template without `{% generation %}`;
            names the row.
    """
    if record.get(config.messages_column) is not None:
        messages = messages_of(record[config.messages_column], where, config.messages_column)
        check_template(tokenizer, where, mask=True)
        out: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = out["input_ids"], out["assistant_masks"]
        if not any(message["role"] == "assistant" and message["content"] for message in messages):
            raise ValueError(f"{where}: the assistant writes nothing in this conversation")
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
    rows: list[list[TokenizedConversation]], pad_token_id: int, context_length: int | None = None
) -> Batch:
    """A batch of rows, each of conversations one after the other.

    Args:
        context_length: tokens of each row; the longest row's if None.

    Returns:
        `input_ids`, `labels`, `position_ids` (B, T) int64 and `document_ids` (B, T) int32.
    """
    length = context_length or max(sum(map(len, row)) for row in rows)
    shape = (len(rows), length)
    input_ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    position_ids_BT = np.zeros(shape, dtype=np.int64)
    document_ids_BT = np.zeros(shape, dtype=np.int32)
    for row, conversations in enumerate(rows):
        start = 0
        for number, conversation in enumerate(conversations):
            end = start + len(conversation)
            input_ids_BT[row, start:end] = conversation.tokens
            labels_BT[row, start:end] = np.where(
                conversation.is_target, conversation.tokens, IGNORED_LABEL
            )
            labels_BT[row, start] = IGNORED_LABEL  # the token before it is another conversation's
            position_ids_BT[row, start:end] = np.arange(len(conversation))
            document_ids_BT[row, start:end] = number
            start = end
        position_ids_BT[row, start:] = np.arange(length - start)
        document_ids_BT[row, start:] = len(conversations)
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "labels": torch.from_numpy(labels_BT),
        "position_ids": torch.from_numpy(position_ids_BT),
        "document_ids": torch.from_numpy(document_ids_BT),
    }


class SFTDataModule(LightningDataModule):
    """Conversations of local files, tokenized in memory; resumes where it stopped.

    Raises:
        ValueError: bad data, named by its row, before training starts.
    """

    def __init__(self, config: SFTDataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.next_step = 0
        self.place: Place = (0, 0)
        self._splits: dict[str, list[TokenizedConversation]] = {}

    @property
    def context_length(self) -> int:
        return self.config.context_length

    def conversations(self, setting: str) -> list[TokenizedConversation]:
        """Those of `train_files`, `val_files` or `test_files`, read once."""
        if setting not in self._splits:
            self._splits[setting] = self._read(setting)
        return self._splits[setting]

    def setup(self, stage: str) -> None:
        wanted = {"fit": "train_files", "validate": "val_files"}.get(stage, "test_files")
        if not getattr(self.config, wanted):
            raise ValueError(f"data.{wanted} is empty: name the files, for example [chats.jsonl]")
        for setting in ("train_files", "val_files") if stage == "fit" else (wanted,):
            self.conversations(setting)

    def train_dataloader(self) -> Iterable[Batch]:
        rank, world = self._rank_and_world
        stream = EpochBatches(
            self._rows_of_epoch, self._collate, self.config.rows_per_batch, rank, world,
            (self.next_step, self.place),
        )  # fmt: skip
        workers = self.config.num_workers
        loader = DataLoader(
            stream, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        return with_lookahead(loader, self.trainer)

    def val_dataloader(self) -> list[DataLoader] | DataLoader:
        return self._fixed("val_files") if self.config.val_files else []

    def test_dataloader(self) -> DataLoader:
        return self._fixed("test_files")

    predict_dataloader = test_dataloader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # This hook sees a batch when it is consumed, not when it was fetched ahead.
        if "place" not in batch:
            return batch
        if self.trainer is not None:
            batch = take_lookahead(batch, self.trainer, lambda prepared: prepared)
        self.next_step, self.place = batch["step"] + 1, batch["place"]
        return {key: value for key, value in batch.items() if key != "place"}

    def state_dict(self) -> dict[str, Any]:
        return {"next_step": self.next_step, "place": list(self.place), "data": self._digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["data"] != self._digest():
            raise ValueError(
                "data: the checkpoint was trained on other conversations, or on rows of another "
                "context_length, packing or seed; set them back, or begin a new run from its "
                "weights with model.init_from"
            )
        self.next_step = state_dict["next_step"]
        self.place = (state_dict["place"][0], state_dict["place"][1])

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

    def _rows_of_epoch(self, epoch: int) -> list[list[int]]:
        """Rows of an epoch as indices of conversations."""
        lengths = [len(c) for c in self.conversations("train_files")]
        order = np.arange(len(lengths))
        if self.config.shuffle:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(order)
        return self._pack([int(index) for index in order], lengths)

    def _pack(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        if not self.config.packing:
            return [[index] for index in order]
        packed = pack_whole([lengths[index] for index in order], self.config.context_length)
        return [[order[place] for place in row] for row in packed]

    def _collate(self, rows: list[list[int]], setting: str = "train_files") -> Batch:
        conversations = self.conversations(setting)
        return collate_conversations(
            [[conversations[index] for index in row] for row in rows],
            int(self.tokenizer.pad_token_id or 0),
            self.config.context_length if self.config.packing else None,
        )

    def _fixed(self, setting: str) -> DataLoader:
        """Rows in the files' order; ranks make equally many, so the last may repeat a row."""
        rank, world = self._rank_and_world
        lengths = [len(c) for c in self.conversations(setting)]
        rows = self._pack(list(range(len(lengths))), lengths)
        each = -(-len(rows) // world)
        mine = [rows[(rank + i * world) % len(rows)] for i in range(each)]
        size = self.config.rows_per_batch
        batches = [mine[i : i + size] for i in range(0, each, size)]
        return DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=lambda rows: self._collate(rows, setting),
        )

    def _digest(self) -> str:
        digest = hashlib.sha256(
            repr((self.config.context_length, self.config.packing, self.config.seed)).encode()
        )
        for conversation in self.conversations("train_files"):
            digest.update(conversation.tokens.tobytes() + conversation.is_target.tobytes())
        return digest.hexdigest()[:16]

    @property
    def _rank_and_world(self) -> tuple[int, int]:
        return data_replica(self.trainer)


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
