"""Preference pairs in TRL's format: explicit or implicit prompt, conversations or text.

Rows are padded on the right, where causal attention from real tokens never looks, and labels are
-100 but at completion tokens. With `share_prompt` a row is a pair: the prompt, the chosen
completion, then the prompt's last token again, since it predicts the first token of both, and the
rejected completion. Otherwise a row is a sequence.

Legend: P pairs, S = 2P sequences (the chosen ones first, then the rejected), N rows (P or S), T
tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.datamodules.conversations import (
    Record,
    column_of,
    common_prefix,
    is_conversation,
    messages_of,
    prompt_and_completions,
    read_records,
)
from ic.datamodules.epochs import EpochDataModule
from ic.datamodules.options import PreferenceDataOptions
from ic.model.labels import IGNORE_INDEX


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a prompt and of its two completions, int32, and where the pair stands."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    where: str

    @property
    def key(self) -> str:
        """Hash of the tokens."""
        digest = hashlib.sha256()
        for part in (self.prompt, self.chosen, self.rejected):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        return digest.hexdigest()[:24]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, record: Record, where: str, config: PreferenceDataOptions
) -> TokenizedPair:
    """A row of the data as tokens.

    Raises:
        ValueError: a missing column, an empty completion, or two that are the same; names the row.
    """
    chosen = column_of(record, config.chosen_column, where)
    rejected = column_of(record, config.rejected_column, where)
    if chosen == rejected:
        raise ValueError(
            f'{where}: "{config.chosen_column}" and "{config.rejected_column}" are the same; a '
            "pair must differ"
        )
    prompt = record.get(config.prompt_column)
    # Some data sets repeat the prompt as text beside conversations that hold it.
    if prompt is None or (isinstance(prompt, str) and is_conversation(chosen)):
        prompt, chosen, rejected = _split_prompt(chosen, rejected, where, config)
    ids, completions = prompt_and_completions(
        tokenizer, prompt, {config.chosen_column: chosen, config.rejected_column: rejected}, where
    )
    parts = [np.asarray(part, dtype=np.int32) for part in (ids, *completions)]
    return TokenizedPair(parts[0], parts[1], parts[2], where)


def collate_pairs(
    pairs: list[TokenizedPair],
    pad_token_id: int,
    length_multiple: int = 1,
    *,
    share_prompt: bool = True,
) -> Batch:
    """A batch of pairs, as long as its longest row, rounded up to a multiple."""
    rows = _rows_of_pairs(pairs) if share_prompt else _rows_of_sequences(pairs)
    longest = max(sum(len(p.before) + len(p.completion) for p in parts) for parts in rows)
    shape = (len(rows), -(-longest // length_multiple) * length_multiple)
    input_ids_NT = np.full(shape, pad_token_id, dtype=np.int64)
    labels_NT = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_NT = np.tile(np.arange(shape[1]), (shape[0], 1))
    index_NT = np.zeros(shape, dtype=np.int32)
    sequence_NT = np.zeros(shape, dtype=np.int64)
    for row, parts in enumerate(rows):
        end = 0
        for before, completion, sequence in parts:
            start, first = end, end + len(before)
            end = first + len(completion)
            input_ids_NT[row, start:first] = before
            input_ids_NT[row, first:end] = labels_NT[row, first:end] = completion
            index_NT[row, first:end] = np.arange(1, len(completion) + 1)
            sequence_NT[row, first:end] = sequence
    branches = None
    if share_prompt:
        branches = [(len(p.prompt) - 1, len(p.prompt) + len(p.chosen)) for p in pairs]
        for row, (shared, second) in enumerate(branches):
            position_NT[row, second:] -= second - shared
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return {
        "input_ids": torch.from_numpy(input_ids_NT),
        "labels": torch.from_numpy(labels_NT),
        "position_ids": torch.from_numpy(position_NT),
        "branches": branches,
        "completion_index": torch.from_numpy(index_NT),
        "completion_sequence": torch.from_numpy(sequence_NT),
        "completion_tokens": torch.tensor([len(completion) for completion in completions]),
        "pair_tokens": torch.tensor([pair.num_tokens for pair in pairs]),
        "pair_keys": [pair.key for pair in pairs],
        "pair_rows": [pair.where for pair in pairs],
        "pairs_counted": len(pairs),
    }


class _Part(NamedTuple):
    """A completion of a row, the tokens in front of it, and the sequence that it belongs to."""

    before: np.ndarray
    completion: np.ndarray
    sequence: int


def _rows_of_sequences(pairs: list[TokenizedPair]) -> list[list[_Part]]:
    chosen = [[_Part(pair.prompt, pair.chosen, i)] for i, pair in enumerate(pairs)]
    return chosen + [
        [_Part(pair.prompt, pair.rejected, i)] for i, pair in enumerate(pairs, len(pairs))
    ]


def _rows_of_pairs(pairs: list[TokenizedPair]) -> list[list[_Part]]:
    return [
        [_Part(pair.prompt, pair.chosen, i), _Part(pair.prompt[-1:], pair.rejected, len(pairs) + i)]
        for i, pair in enumerate(pairs)
    ]


class PreferenceDataModule(EpochDataModule[PreferenceDataOptions, TokenizedPair, int]):
    """Preference pairs, each a row of `EpochDataModule`."""

    example_name = "pair"
    file_example = "pairs.jsonl"
    other_data_error = (
        "data.train_files: the checkpoint was trained on other pairs; give the same files, "
        "or begin a new run from its weights with model.init_from"
    )

    def all_pairs(self) -> list[TokenizedPair]:
        """Every pair of training, validation and test."""
        return [p for s in ("train_files", "val_files", "test_files") for p in self.examples(s)]

    def collate(self, pairs: list[TokenizedPair]) -> Batch:
        """`collate_pairs` with the tokenizer's padding, to a length that the strategy takes."""
        return collate_pairs(
            pairs,
            int(self.tokenizer.pad_token_id or 0),
            self.length_multiple,
            share_prompt=self.config.share_prompt,
        )

    def _read(self, setting: str) -> list[TokenizedPair]:
        kept, dropped = [], []
        limit = self.config.context_length
        for where, record in read_records(getattr(self.config, setting), setting):
            pair = tokenize_pair(self.tokenizer, record, where, self.config)
            if pair.num_tokens <= limit:
                kept.append(pair)
                continue
            if self.config.too_long == "error":
                raise ValueError(
                    f"{where}: {pair.num_tokens} tokens, more than data.context_length={limit}; "
                    "raise it, or leave such pairs out with data.too_long=drop"
                )
            dropped.append(where)
        if dropped:
            rank_zero_info(
                f"data.{setting}: dropped {len(dropped)} of {len(kept) + len(dropped)} pairs of "
                f"more than {limit} tokens, the first is {dropped[0]}"
            )
        if not kept and getattr(self.config, setting):
            raise ValueError(f"data.{setting}: no pairs to use")
        return kept

    def _sizes(self) -> tuple[int, int]:
        pairs = self.examples("train_files")
        # A prompt counts once, as it stands in the file, whether rows share it or not.
        tokens = (len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
        return len(pairs), sum(tokens)

    def _rows(self, setting: str, order: list[int]) -> list[int]:
        return order

    def _collate(self, rows: list[int], setting: str = "train_files") -> Batch:
        pairs = self.examples(setting)
        return self.collate([pairs[index] for index in rows])

    def _uncounted(self, batch: Batch, num_rows: int) -> Batch:
        return {**batch, "pairs_counted": batch["pairs_counted"] - num_rows}

    def _digest(self) -> str:
        keys = "".join(pair.key for pair in self.examples("train_files"))
        return hashlib.sha256(keys.encode()).hexdigest()[:16]


def _split_prompt(
    chosen: Any, rejected: Any, where: str, config: PreferenceDataOptions
) -> tuple[Any, Any, Any]:
    """The common beginning of two completions as the prompt: whole turns, or characters."""
    if is_conversation(chosen):
        messages_of(chosen, where, config.chosen_column)
        messages_of(rejected, where, config.rejected_column)
    elif not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(
            f'{where}: "{config.chosen_column}" and "{config.rejected_column}" must both be text '
            "or both messages"
        )
    at = common_prefix(chosen, rejected)
    if isinstance(chosen, str) and at and chosen[at - 1] == " ":
        at -= 1  # a space belongs to the word behind it
    for column, value in ((config.chosen_column, chosen), (config.rejected_column, rejected)):
        if len(value) == at:
            raise ValueError(f'{where}: "{column}" is empty behind what both have in common')
    if not at:
        raise ValueError(
            f'{where}: no "{config.prompt_column}", and "{config.chosen_column}" and '
            f'"{config.rejected_column}" do not begin with a common one'
        )
    return chosen[:at], chosen[at:], rejected[at:]
