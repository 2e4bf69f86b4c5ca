"""Making an `AttentionContext`: for training, prefill, `generate` and rows of unequal length.

Legend: B batch, T new tokens, S visible tokens, M = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ic.model.branches import Branches, check_branches
from ic.model.cache import PAGE_TOKENS, LatentCache
from ic.model.config import MLAConfig
from ic.model.context import AttentionContext
from ic.model.masks import (
    given_mask,
    needs_no_mask,
    num_unpadded,
    num_visible,
    padding_mask,
    static_mask,
)
from ic.model.operators import Operators
from ic.model.rope import DecoupledRotaryEmbedding
from ic.model.sharing import SequenceSharing
from ic.model.static_cache import StaticLatentCache


@dataclass(frozen=True)
class ContextBuilder:
    """Makes the contexts of one model.

    Attributes:
        config, operators, rotary: the model's.
        parallel: the ranks that share each sequence, or None.
    """

    config: MLAConfig
    operators: Operators
    rotary: DecoupledRotaryEmbedding
    parallel: SequenceSharing | None = None

    def build(
        self,
        batch: int,
        tokens: int,
        device: torch.device,
        cache: Cache | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        branches: Branches | None = None,
    ) -> AttentionContext:
        """What the layers need for `tokens` new tokens in each of `batch` rows.

        Args:
            cache: earlier tokens, which need not be equally many in each row.
            attention_mask, position_ids, document_ids, branches: as in `MLAModel.forward`.

        Raises:
            ValueError: inputs that exclude each other, more tokens than the model has positions, or
                what the attention backend does not support.
        """
        if isinstance(cache, LatentCache) and cache.is_ragged:
            if not (attention_mask is None and document_ids is None and branches is None):
                raise ValueError(
                    "a cache with rows of unequal length goes without attention_mask, document_ids "
                    "and branches"
                )
            return self._rows(batch, tokens, cache, position_ids)
        past = 0 if cache is None else cache.get_seq_length()
        num_keys = None
        if cache is not None and cache.is_compileable:
            self._check_static(cache, document_ids, branches)
            if isinstance(past, Tensor):
                if not self._reads_length(past, tokens):
                    return self._static(batch, tokens, cache, attention_mask, position_ids)
                past = int(past)
            num_keys = past + tokens
            self._check_room(num_keys, cache)
        if branches is not None:
            if past or attention_mask is not None or document_ids is not None:
                raise ValueError("branches go without cache, attention_mask and document_ids")
            check_branches(branches, batch, tokens)
        elif document_ids is None:
            self._check_length(past + tokens)
        if document_ids is not None and (past or attention_mask is not None):
            raise ValueError("document_ids goes with neither a cache nor an attention_mask")
        mask_BTS, visible_BT = self._masked(attention_mask, batch, past, tokens)
        if mask_BTS is not None and self.parallel is not None:
            raise ValueError(
                "padding (attention_mask) does not go with strategy.context_parallel_size above 1; "
                "use sequences of equal length, or document_ids"
            )
        is_padded = (
            mask_BTS is not None and attention_mask is not None and attention_mask.dim() == 2
        )
        if visible_BT is None:
            visible_BT = num_visible(document_ids, branches, past, tokens, device)
        is_long = past + tokens > self.config.max_position_embeddings
        if is_long and document_ids is not None:
            self._check_length(int(visible_BT.max()))  # a row may hold more tokens than any text
        if position_ids is None:
            # Padded rows and branches count their own tokens; documents share one line of
            # positions as long as it reaches.
            position_ids = (
                visible_BT - 1
                if is_padded or branches is not None or is_long
                else torch.arange(past, past + tokens, device=device)[None]
            )
        is_split = self.parallel is not None and (
            cache is None or tokens > self.config.absorbed_max_queries
        )
        if self.parallel is not None and is_split:
            position_ids = self.parallel.split(position_ids)
            visible_BT = self.parallel.split(visible_BT)
        cos_BTF, sin_BTF = self.rotary(position_ids)
        lengths_B = None
        if self.operators.attention.capabilities.row_lengths:
            lengths_B = torch.full((batch,), past + tokens, dtype=torch.int32, device=device)
        return AttentionContext(
            cos_BTF,
            sin_BTF,
            visible_BT=visible_BT,
            mask_BTS=mask_BTS,
            document_ids_BT=document_ids,
            segments=None if document_ids is None else self._segments(document_ids),
            branches=branches,
            lengths_B=lengths_B,
            append_slots_M=self._slots(batch, tokens, past, cache, device),
            num_keys=num_keys,
            parallel=self.parallel,
            is_split=is_split,
        )

    def _masked(
        self, attention_mask: Tensor | None, batch: int, past: int, tokens: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which keys (B, T, S) a mask leaves to the new tokens, and how many; None and None where
        causal attention alone does the same.
        """
        if attention_mask is None:
            return None, None
        if attention_mask.dim() == 4:
            mask_BTS = given_mask(attention_mask, batch, tokens, past + tokens)
            return mask_BTS, mask_BTS.sum(-1)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dimensions; give (B, S), or a whole "
                "mask of (B, 1, T, S)"
            )
        if needs_no_mask(attention_mask, past, tokens):
            return None, None
        return padding_mask(attention_mask, past, tokens), num_unpadded(attention_mask, tokens)

    def _static(
        self,
        batch: int,
        tokens: int,
        cache: Cache,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> AttentionContext:
        """For a pass over a static cache whose length stays on the device: the same launches with
        the same shapes at every length.
        """
        past: Any = cache.get_seq_length()
        capacity, _ = cache.get_mask_sizes(tokens, 0)
        device = past.device
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_room(int(past) + tokens, cache)
        position_BT = (past + torch.arange(tokens, device=device))[None]
        visible_BT = position_BT + 1
        lengths_B = mask_BTS = None
        if attention_mask is not None and attention_mask.dim() == 4:
            mask_BTS = given_mask(attention_mask, batch, tokens, capacity)
            visible_BT = mask_BTS.sum(-1)
        elif attention_mask is not None or not self._decodes_by_lengths(tokens):
            mask_BTS = static_mask(attention_mask, position_BT, capacity)
            visible_BT = mask_BTS.sum(-1)
        else:
            lengths_B = (past + tokens).clamp(max=capacity).int().repeat(batch)
        if position_ids is None:
            is_padded = attention_mask is not None and attention_mask.dim() == 2
            position_ids = visible_BT - 1 if is_padded else position_BT
        cos_BTF, sin_BTF = self.rotary(position_ids)
        return AttentionContext(
            cos_BTF,
            sin_BTF,
            visible_BT=visible_BT,
            mask_BTS=mask_BTS,
            lengths_B=lengths_B,
            append_slots_M=self._slots(batch, tokens, past, cache, device),
        )

    def _check_static(self, cache: Cache, *others: Any) -> None:
        capacity, _ = cache.get_mask_sizes(1, 0)
        if self.parallel is not None or any(other is not None for other in others):
            raise ValueError(
                "a static cache goes with neither strategy.context_parallel_size above 1 nor "
                "document_ids nor branches; use a LatentCache, or none"
            )
        if capacity > self.config.max_position_embeddings:
            raise ValueError(
                f"a static cache of {capacity} tokens: the model has "
                f"{self.config.max_position_embeddings} positions (max_position_embeddings); make "
                "a shorter one"
            )

    def _check_room(self, tokens: int, cache: Cache) -> None:
        capacity, _ = cache.get_mask_sizes(1, 0)
        if tokens > capacity:
            raise ValueError(
                f"{tokens} tokens: the static cache has {capacity} places; make a longer one"
            )

    def _reads_length(self, past: Tensor, tokens: int) -> bool:
        """Whether a pass asks how many tokens a static cache holds: a prefill, which then attends
        to no more than those. Decoding would wait for the device each time.
        """
        if tokens <= self.config.absorbed_max_queries or torch.compiler.is_compiling():
            return False
        return not (past.is_cuda and torch.cuda.is_current_stream_capturing())

    def _rows(
        self, batch: int, tokens: int, cache: LatentCache, position_ids: Tensor | None
    ) -> AttentionContext:
        """For the next tokens of rows that end at different places."""
        lengths = cache.row_lengths
        if len(lengths) != batch:
            raise ValueError(f"the cache has {len(lengths)} rows, the input {batch}")
        self._check_length(max(lengths) + tokens)
        capacity_tokens = cache.reserve(tokens)
        layer: Any = cache.layers[0]
        device = layer.buffer.device
        # Pinned, the lengths go to a GPU without a wait for it.
        past_B = torch.tensor(lengths, pin_memory=device.type == "cuda")
        past_B1 = past_B.to(device, non_blocking=True)[:, None]
        position_BT = past_B1 + torch.arange(tokens, device=device)
        first_B1 = torch.arange(0, batch * capacity_tokens, capacity_tokens, device=device)[:, None]
        cos_BTF, sin_BTF = self.rotary(position_BT if position_ids is None else position_ids)
        lengths_B = mask_BTS = None
        can = self.operators.attention.capabilities
        if not can.row_lengths and not can.mask:
            raise ValueError(
                f"attention={self.config.attention_backend} takes no rows of unequal length: give "
                "it rows of equal length, or use attention=torch"
            )
        if self._decodes_by_lengths(tokens):
            lengths_B = (past_B1[:, 0] + tokens).int()
        else:
            index_S = torch.arange(max(lengths) + tokens, device=device)
            mask_BTS = index_S <= position_BT[..., None]
        return AttentionContext(
            cos_BTF,
            sin_BTF,
            visible_BT=position_BT + 1,
            mask_BTS=mask_BTS,
            lengths_B=lengths_B,
            append_slots_M=(first_B1 + position_BT).flatten(),
        )

    def _decodes_by_lengths(self, tokens: int) -> bool:
        """Whether lengths are enough for so many new tokens, or a mask is needed."""
        can = self.operators.attention.capabilities
        at_once = self.config.absorbed_max_queries
        if can.max_decode_queries is not None:
            at_once = min(at_once, can.max_decode_queries)
        return can.row_lengths and tokens <= at_once

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"{tokens} tokens: the model has {self.config.max_position_embeddings} positions "
                "(max_position_embeddings); shorten the input"
            )

    def _segments(self, document_ids_BT: Tensor) -> Any:
        attention = self.operators.attention
        if not attention.capabilities.documents:
            raise ValueError(
                f"attention={self.config.attention_backend} does not attend within documents "
                "(document_ids): give it one document a row, or use attention=torch"
            )
        return attention.document_segments(document_ids_BT)

    def _slots(
        self, batch: int, tokens: int, past: Any, cache: Cache | None, device: torch.device
    ) -> Tensor | None:
        """Where the new tokens go in the pages that `extend` returns; None if nothing appends them
        at once.
        """
        if self.operators.append is None or tokens > PAGE_TOKENS:
            return None
        if isinstance(cache, StaticLatentCache):
            capacity, _ = cache.get_mask_sizes(tokens, 0)
            first_B1 = torch.arange(0, batch * capacity, capacity, device=device)[:, None]
            place_T = past + torch.arange(tokens, device=device)
            # A token past the end must not fall into the next row: -1 is written nowhere.
            return torch.where(place_T < capacity, first_B1 + place_T, -1).flatten()
        # Every row has one page, and they are its end.
        slots = torch.arange(batch * PAGE_TOKENS, device=device)
        return slots.view(batch, PAGE_TOKENS)[:, -tokens:].reshape(-1).contiguous()
