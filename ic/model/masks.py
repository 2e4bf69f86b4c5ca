"""Masks and document bounds of a batch.

Legend: B batch, T new tokens, S visible tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ic.model.sdpa import Segments


def padding_mask(attention_mask: Tensor | None, past: int, tokens: int) -> Tensor | None:
    """(B, S) of 0 and 1 -> (B, T, S) bool, True where a key is visible."""
    if attention_mask is None:
        return None
    keys = past + tokens
    if attention_mask.shape[1] != keys:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but {past} are cached and "
            f"{tokens} are new"
        )
    index = torch.arange(keys, device=attention_mask.device)
    query = index[past:, None]
    # A padding query sees itself, because a row without any key would be NaN.
    return (index <= query) & (attention_mask.bool()[:, None] | (index == query))


def document_segments(document_ids_BT: Tensor) -> Segments:
    """Contiguous runs as (row, start, end); one copy to the host."""
    segments: Segments = []
    for row, ids in enumerate(document_ids_BT.cpu()):
        edges = (ids[1:] != ids[:-1]).nonzero().flatten().add(1).tolist()
        bounds = [0, *edges, len(ids)]
        segments += [(row, i, j) for i, j in pairwise(bounds)]
    return segments
