"""Attention whose weights somebody asked for (`output_attentions`).

Legend: B batch, T query tokens (the last of S), S key tokens, H heads, K qk_head_dim, V v_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.model.sdpa import Segments


class AttentionRecorder:
    """Attention on plain matrix products, in place of a backend's, that keeps its weights.

    Attributes:
        weights: (B, H, T, S) of each layer so far, in the query's dtype. Their softmax is taken in
            float32.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def expanded(
        self,
        q_BTHK: Tensor,
        k_BSHK: Tensor,
        v_BSHV: Tensor,
        *,
        scale: float,
        mask_BTS: Tensor | None = None,
        segments: Segments | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """As `AttentionOperators.expanded`."""
        visible_BTS = mask_BTS
        if visible_BTS is None:
            tokens, keys = q_BTHK.shape[1], k_BSHK.shape[1]
            index_S = torch.arange(keys, device=q_BTHK.device)
            visible_BTS = (index_S <= index_S[keys - tokens :, None])[None]
            if document_ids_BT is not None:
                visible_BTS = visible_BTS & (
                    document_ids_BT[:, :, None] == document_ids_BT[:, None]
                )
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).float() * scale
        scores_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf)
        weights_BHTS = scores_BHTS.softmax(-1).to(q_BTHK.dtype)
        self.weights.append(weights_BHTS)
        return torch.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV.to(q_BTHK.dtype))
