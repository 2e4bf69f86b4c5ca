"""Documents of packed rows, as Hugging Face's trainers and collators mark them.

Legend: B batch, T tokens, E edges.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache


def marked_documents(
    batch: int,
    tokens: int,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Tensor | None:
    """`document_ids` (B, T), in contiguous runs; None where every row is one text.

    Args:
        position_ids: (B or 1, T); a text begins wherever they do not rise. Asked if nothing else
            marks the texts. They may skip, as in a curriculum of positions.
        attention_mask: (B, T) of 0 and 1, or of another form, which hides what it hides.
        cache: of earlier tokens. With any in it, or static, positions only rotate.
        seq_idx: (B, T), another number for each text.
        cu_seq_lens_q, cu_seq_lens_k: (E,), where texts begin in the B * T tokens, and their end.

    Raises:
        ValueError: marks that contradict each other, do not fit the rows, or go with padding or a
            cache.
    """
    edges = {
        name: lengths
        for name, lengths in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k))
        if lengths is not None
    }
    marks = {name: _by_edges(name, value, batch, tokens) for name, value in edges.items()}
    if seq_idx is not None:
        if seq_idx.shape != (batch, tokens):
            raise ValueError(
                f"seq_idx has the shape {tuple(seq_idx.shape)}: give one number for each of "
                f"{batch} x {tokens} tokens"
            )
        marks["seq_idx"] = seq_idx
    if not marks:
        document_ids = _by_positions(position_ids, attention_mask, cache, batch, tokens)
        marks = {} if document_ids is None else {"position_ids that start anew": document_ids}
    if not marks:
        return None
    if cache is not None:
        raise ValueError(
            f"{' and '.join(marks)} mark several texts in a row, and the next token over a cache "
            "would see all of them: give no past_key_values"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"{' and '.join(marks)} go without padding (attention_mask): pack the texts without "
            "it, or give one text per row"
        )
    (first, document_ids), *others = marks.items()
    for name, other in others:
        if not _starts(other).equal(_starts(document_ids).to(other.device)):
            raise ValueError(
                f"{first} and {name} do not mark the same texts: leave one of them out"
            )
    return document_ids


def _by_positions(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: Cache | None,
    batch: int,
    tokens: int,
) -> Tensor | None:
    """Texts whose positions start anew."""
    if position_ids is None or tokens == 1:
        return None
    # A graph is captured of decoding, which is one text's.
    is_graph = torch.compiler.is_compiling() or (cache is not None and cache.is_compileable)
    if cache is not None and (is_graph or cache.get_seq_length()):
        return None
    if attention_mask is not None and attention_mask.shape != (batch, tokens):
        return None  # of another form, or it covers cached tokens
    again = position_ids[:, 1:] <= position_ids[:, :-1]
    if not bool(again.any()):
        return None
    if attention_mask is None or bool(attention_mask.all()):
        return F.pad(again, (1, 0)).cumsum(-1, dtype=torch.int32).expand(batch, tokens)
    # Padding has any positions; the real tokens of a row are one text.
    real = attention_mask.bool()
    if bool((again & real[:, 1:] & real[:, :-1]).any()):
        raise ValueError(
            "position_ids start anew within a row, which marks packed texts, and attention_mask "
            "marks padding: pack without padding, or give one text per row"
        )
    return None


def _by_edges(name: str, edges_E: Tensor, batch: int, tokens: int) -> Tensor:
    total = batch * tokens
    bounds = edges_E.tolist()
    rises = all(i < j for i, j in pairwise(bounds))
    if edges_E.dim() != 1 or bounds[:1] != [0] or bounds[-1] != total or not rises:
        raise ValueError(
            f"{name}={bounds}: must rise from 0 to the {total} tokens of the batch ({batch} x "
            f"{tokens})"
        )
    if not set(range(0, total, tokens)) <= set(bounds):
        raise ValueError(
            f"{name}={bounds}: a text reaches over the end of a row of {tokens} tokens"
        )
    index = torch.arange(total, device=edges_E.device)
    return torch.bucketize(index, edges_E[1:], right=True).int().view(batch, tokens)


def _starts(document_ids_BT: Tensor) -> Tensor:
    return document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
