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


def padding_mask(attention_mask: Tensor, past: int, tokens: int) -> Tensor:
    """(B, S) of 0 and 1 -> (B, T, S) bool, True where a key is visible."""
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


def given_mask(attention_mask: Tensor, batch: int, tokens: int, keys: int) -> Tensor:
    """A mask that the caller made, (B or 1, 1, T, S) -> (B or 1, T, S) bool, True where visible.

    Args:
        attention_mask: bool, or float with 0 where a key is visible and the dtype's minimum or -inf
            where it is not. Of more than `keys` keys, as for the places of a static cache, the
            first count.

    Raises:
        ValueError: another shape or dtype, or a float that is neither.
    """
    shape = tuple(attention_mask.shape)
    fits = shape[0] in (1, batch) and shape[1] == 1 and shape[2] == tokens and shape[3] >= keys
    if not fits:
        raise ValueError(
            f"attention_mask has shape {shape}; with four dimensions it must be ({batch} or 1, 1, "
            f"{tokens}, {keys}): one mask for all heads"
        )
    mask_BTS = attention_mask[:, 0, :, :keys]
    if mask_BTS.is_floating_point():
        hidden_BTS = mask_BTS <= torch.finfo(mask_BTS.dtype).min
        mask_BTS, given_BTS = ~hidden_BTS, mask_BTS
        if not torch.compiler.is_compiling() and bool((given_BTS[mask_BTS] != 0).any()):
            raise ValueError(
                "attention_mask adds other numbers than 0 and the dtype's minimum to the scores; "
                "MLA's backends hide keys or show them: give a mask of bool"
            )
    elif mask_BTS.dtype != torch.bool:
        raise ValueError(
            f"attention_mask with four dimensions is of {mask_BTS.dtype}; give bool or a float"
        )
    # A query without any key would be NaN; it sees all, as in transformers.
    return mask_BTS | ~mask_BTS.any(-1, keepdim=True)


def static_mask(attention_mask: Tensor | None, position_BT: Tensor, capacity: int) -> Tensor:
    """Of the places of a static cache, which new tokens at `position_BT` see: (B or 1, T, S) bool.

    Args:
        attention_mask: (B, up to S) of 0 and 1, or None.

    Raises:
        ValueError: a mask of more tokens than the cache has places.
    """
    index = torch.arange(capacity, device=position_BT.device)
    query = position_BT[..., None]
    causal = index <= query
    if attention_mask is None:
        return causal
    behind = capacity - attention_mask.shape[1]
    if behind < 0:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, and the static cache has "
            f"{capacity} places"
        )
    real_BS = F.pad(attention_mask.bool(), (0, behind))
    return causal & (real_BS[:, None] | (index == query))


def num_unpadded(attention_mask: Tensor, tokens: int) -> Tensor:
    """Keys that each new token sees, itself included, in rows with padding: (B, T)."""
    return attention_mask.long().cumsum(-1)[:, -tokens:].clamp(min=1)


def num_visible(
    document_ids: Tensor | None,
    branches: Branches | None,
    past: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """Keys that each new token sees, itself included, without a mask: (B or 1, T)."""
    if branches is not None:
        return num_visible_in_branches(branches, tokens, device)
    index = torch.arange(past, past + tokens, device=device)[None]
    if document_ids is None:
        return index + 1
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(-1).values + 1


def needs_no_mask(attention_mask: Tensor, past: int, tokens: int) -> bool:
    """Whether causal attention alone hides every padding token from every real one: there is none,
    or all of it stands behind the real tokens of its row. A compiled graph does not ask.
    """
    if torch.compiler.is_compiling():
        return False
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
