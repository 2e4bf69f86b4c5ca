"""What every layer of one forward pass shares.

Legend: B batch, T new tokens, S visible tokens, F = qk_rope_head_dim / 2, M = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ic.model.attention_weights import AttentionRecorder
from ic.model.branches import Branches
from ic.model.sdpa import Segments
from ic.model.sharing import SequenceSharing


@dataclass
class AttentionContext:
    """What every layer of one forward pass shares; made once, by `ic.model.build_context`.

    Attributes:
        cos_BTF, sin_BTF: rotation of the new tokens, (B or 1, T, P/2) float32.
        visible_BT: number of keys each new token sees (itself included), or None if no layer asks.
        mask_BTS: True where a key is visible; None for plain causal attention.
        document_ids_BT: ids of documents in contiguous runs, or None.
        segments: the same documents as (row, start, end), or None if attention reads the ids.
        branches: bounds of each row's two continuations, in whole sequences, or None.
        lengths_B: int32, number of keys the last token sees; None unless decode reads it.
        append_slots_M: int64 (B * T,), places of the new tokens in the pages that `extend` of the
            cache's layers returns. None unless one kernel may normalise, rotate and append them, or
            rows of unequal length each end at a place of their own.
        num_keys: the pass reads this many of a static or paged cache's places; None for all.
        block_table_BN: int, pages of each row of a paged cache, in order. Slots are then places in
            those of all rows.
        reads_pages: with `block_table_BN`, attention reads the pages itself, of each row as many
            tokens as `lengths_B` says. Else they are gathered first.
        parallel: the ranks that share each sequence, or None. Rotation and `visible_BT` are then of
            this rank's tokens, documents of the whole sequence.
        is_split: with `parallel`, whether the new tokens are spread over the ranks; else each rank
            has all of them.
        recorder: attends in place of the backend and keeps the weights, or None.
        indexing: an `ic.model.indexing.Indexing`, of what indexers choose in this pass; None where
            none is asked.
    """

    cos_BTF: Tensor
    sin_BTF: Tensor
    visible_BT: Tensor | None = None
    mask_BTS: Tensor | None = None
    segments: Segments | None = None
    document_ids_BT: Tensor | None = None
    branches: Branches | None = None
    lengths_B: Tensor | None = None
    append_slots_M: Tensor | None = None
    num_keys: int | None = None
    block_table_BN: Tensor | None = None
    reads_pages: bool = False
    parallel: SequenceSharing | None = None
    is_split: bool = False
    recorder: AttentionRecorder | None = None
    indexing: Any = None

    def recording(self) -> AttentionContext:
        """The same with a recorder of its own.

        Raises:
            ValueError: no single set of weights says what such a pass does.
        """
        if self.parallel is not None or self.branches is not None:
            raise ValueError(
                "output_attentions=True goes with neither strategy.context_parallel_size above 1 "
                "nor branches: leave it out"
            )
        return replace(self, recorder=AttentionRecorder())

    @property
    def recorded(self) -> tuple[Tensor, ...] | None:
        """The attention weights of every layer, or None without a recorder."""
        return None if self.recorder is None else tuple(self.recorder.weights)

    def check_shape(self, rows: int, tokens: int) -> None:
        """Raises ValueError unless it was made for so many new tokens in so many rows."""
        made_for = tuple(self.cos_BTF.shape[:2])
        if made_for not in ((1, tokens), (rows, tokens)):
            raise ValueError(
                f"context was made for {made_for[1]} new tokens in {made_for[0]} rows, and the "
                f"input has {tokens} in {rows}: make one for each pass"
            )

    def masked(self, num_keys: int) -> AttentionContext:
        """The same with a mask in place of the rows' lengths, for the expanded form."""
        if self.mask_BTS is not None or self.lengths_B is None:
            return self
        assert self.visible_BT is not None
        index_S = torch.arange(num_keys, device=self.visible_BT.device)
        return replace(self, mask_BTS=index_S < self.visible_BT[..., None])

    def up_to(self, num_keys: int) -> AttentionContext:
        """The same with documents cut off after the first `num_keys` tokens."""
        segments, ids = self.segments, self.document_ids_BT
        if segments is not None:
            segments = [(b, i, min(j, num_keys)) for b, i, j in segments if i < num_keys]
        if ids is not None:
            ids = ids[:, :num_keys]
        return replace(self, segments=segments, document_ids_BT=ids)
