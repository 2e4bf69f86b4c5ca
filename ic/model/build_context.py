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
from ic.model.masks import needs_no_mask, num_visible, padding_mask
from ic.model.operators import Operators
from ic.model.rope import DecoupledRotaryEmbedding
from ic.model.sharing import SequenceSharing


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
        if branches is not None:
            if past or attention_mask is not None or document_ids is not None:
                raise ValueError("branches go without cache, attention_mask and document_ids")
            check_branches(branches, batch, tokens)
        else:
            self._check_length(past + tokens)
        if document_ids is not None and (past or attention_mask is not None):
            raise ValueError("document_ids goes with neither a cache nor an attention_mask")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, not (B, S)")
        if attention_mask is not None and needs_no_mask(attention_mask, past, tokens):
            attention_mask = None
        if attention_mask is not None and self.parallel is not None:
            raise ValueError(
                "padding (attention_mask) does not go with strategy.context_parallel_size above 1; "
                "use sequences of equal length, or document_ids"
            )
        visible_BT = num_visible(attention_mask, document_ids, branches, past, tokens, device)
        if position_ids is None:
            # Padded rows and branches count their own tokens; documents share one line of
            # positions.
            position_ids = (
                torch.arange(past, past + tokens, device=device)[None]
                if attention_mask is None and branches is None
                else visible_BT - 1
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
            mask_BTS=padding_mask(attention_mask, past, tokens),
            document_ids_BT=document_ids,
            segments=None if document_ids is None else self._segments(document_ids),
            branches=branches,
            lengths_B=lengths_B,
            append_slots_M=self._last_slots(batch, tokens, device),
            parallel=self.parallel,
            is_split=is_split,
        )

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
        """Whether lengths are enough for so many new tokens of unequal rows, or a mask is needed.

        Raises:
            ValueError: the attention backend takes neither.
        """
        can = self.operators.attention.capabilities
        if not can.row_lengths and not can.mask:
            raise ValueError(
                f"attention={self.config.attention_backend} takes no rows of unequal length: give "
                "it rows of equal length, or use attention=torch"
            )
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

    def _last_slots(self, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Slots of the new tokens where every row has one page and they are its end; None if
        nothing appends them at once.
        """
        if self.operators.append is None or tokens > PAGE_TOKENS:
            return None
        slots = torch.arange(batch * PAGE_TOKENS, device=device)
        return slots.view(batch, PAGE_TOKENS)[:, -tokens:].reshape(-1).contiguous()
