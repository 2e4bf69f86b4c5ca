"""Masks and document bounds of a batch.

Legend: B batch, T new tokens, S visible tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ic.model.branches import Branches, num_visible_in_branches
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


def num_visible(
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    branches: Branches | None,
    past: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """Keys that each new token sees, itself included: (B or 1, T)."""
    if attention_mask is not None:
        return attention_mask.long().cumsum(-1)[:, -tokens:].clamp(min=1)
    if branches is not None:
        return num_visible_in_branches(branches, tokens, device)
    index = torch.arange(past, past + tokens, device=device)[None]
    if document_ids is None:
        return index + 1
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(-1).values + 1


def needs_no_mask(attention_mask: Tensor, past: int, tokens: int) -> bool:
    """Whether causal attention alone hides every padding token from every real one: there is none,
    or all of it stands behind the real tokens of its row.
    """
    if past or attention_mask.shape[1] != tokens:
        return bool(attention_mask.all())
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def document_segments(document_ids_BT: Tensor) -> Segments:
    """Contiguous runs as (row, start, end); one copy to the host."""
    segments: Segments = []
    for row, ids in enumerate(document_ids_BT.cpu()):
        edges = (ids[1:] != ids[:-1]).nonzero().flatten().add(1).tolist()
        bounds = [0, *edges, len(ids)]
        segments += [(row, i, j) for i, j in pairwise(bounds)]
    return segments
