"""The batch: what every datamodule makes, and modules and callbacks read.

Legend: B rows, T tokens. In preference training a row holds a pair or one of its two sequences:
P pairs, S = 2P sequences, the chosen ones first.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

from torch import Tensor


class Batch(TypedDict):
    """One micro-batch of a rank.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, aligned with `input_ids` (the model shifts, as in Hugging Face), -100
            where not a target.
        position_ids: (B, T) int64.
        step: index of the micro-batch since training, or the set, began.
        document_ids: (B, T) int32, contiguous runs that do not see each other; absent where a row
            is one document.
        answer_mask: (B, T) bool, aligned with `labels`, true where a token answers a question;
            absent where none is marked.
        answers: what each answer of a row is about, such as its task, by the name of what is told;
            absent in training and where nothing is told.
        token_bytes: (B, T) int32, bytes of the text that each token of `input_ids` stands for, 0 of
            special tokens; absent where data is no text.
        num_targets: (2,) int64, numbers of marked and of all targets of the whole optimizer step on
            this rank, with its first micro-batch where gradients are accumulated.
        ahead: the next micro-batches, until the batch is trained on.
        position, place: where the data goes on after this batch, until it is trained on.
        branches: bounds of both completions of each row (`ic.model.branches`); None where a row is
            a sequence. This and all below: of preference pairs alone.
        completion_index: (B, T) int32: 1, 2, ... at the completion tokens, 0 elsewhere.
        completion_sequence: (B, T) int64, the sequence in 0..S of a completion token.
        completion_tokens: (S,) int64, number of completion tokens.
        pair_tokens: (P,) int64, tokens of the longer sequence of a pair.
        pair_keys, pair_rows: hash of each pair's tokens, and where it stands.
        pairs_counted: the first so many are measured; the others only keep ranks in step.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    step: NotRequired[int]
    document_ids: NotRequired[Tensor]
    answer_mask: NotRequired[Tensor]
    answers: NotRequired[list[tuple[dict[str, str], ...]]]
    token_bytes: NotRequired[Tensor]
    num_targets: NotRequired[Tensor]
    ahead: NotRequired[list[Batch]]
    position: NotRequired[list[int]]
    place: NotRequired[tuple[int, int]]
    branches: NotRequired[list[tuple[int, int]] | None]
    completion_index: NotRequired[Tensor]
    completion_sequence: NotRequired[Tensor]
    completion_tokens: NotRequired[Tensor]
    pair_tokens: NotRequired[Tensor]
    pair_keys: NotRequired[list[str]]
    pair_rows: NotRequired[list[str]]
    pairs_counted: NotRequired[int]


def without(batch: Batch, name: str) -> Batch:
    """The batch without one of its optional entries."""
    rest: dict[str, Any] = {key: value for key, value in batch.items() if key != name}
    return cast(Batch, rest)
