"""Sparse attention on our kernels.

Scores and choice have kernels of their own. Attention needs none: the decode kernel reads pages
through a block table, and a page of one token is a token. Each query is then a sequence of the
tokens chosen for it, in prefill as in decoding.

Legend as in `ic.model.sparse_operators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.kernels.triton_index_choice import index_choice
from ic.kernels.triton_index_scores import MAX_HEADS, index_scores
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.model.selection import Selection, VisibleKeys
from ic.model.sparse_operators import SparseOperators


class TritonSparseOperators(SparseOperators):
    """As `SparseOperators`; PyTorch's where a mask hides keys, and for gradients."""

    def choose_keys(
        self,
        q_BTJI: Tensor,
        w_BTJ: Tensor,
        keys: Tensor,
        visible: VisibleKeys,
        top_k: int,
        *,
        key_scale: Tensor | None = None,
        block_table_BN: Tensor | None = None,
    ) -> Selection:
        heads, dim = q_BTJI.shape[2:]
        if visible.mask_BTS is not None or heads > MAX_HEADS or dim < 16 or dim & (dim - 1):
            return super().choose_keys(
                q_BTJI,
                w_BTJ,
                keys,
                visible,
                top_k,
                key_scale=key_scale,
                block_table_BN=block_table_BN,
            )
        first_BT, last_BT = (
            x.expand(w_BTJ.shape[:2]).int() for x in (visible.first_BT, visible.last_BT)
        )
        scores_BTS = index_scores(
            q_BTJI if key_scale is not None else q_BTJI.to(keys.dtype),
            w_BTJ,
            keys,
            first_BT,
            last_BT,
            key_scale=key_scale,
            block_table=block_table_BN,
        )
        return Selection(*index_choice(scores_BTS, first_BT, last_BT, top_k))

    def attend_chosen(
        self,
        q_latent_BTHR: Tensor,
        q_rope_BTHP: Tensor,
        rows_MC: Tensor,
        slot_BTK: Tensor,
        count_BT: Tensor,
        *,
        scale: float,
        row_scale_M: Tensor | None = None,
    ) -> Tensor:
        if torch.is_grad_enabled():
            return super().attend_chosen(
                q_latent_BTHR,
                q_rope_BTHP,
                rows_MC,
                slot_BTK,
                count_BT,
                scale=scale,
                row_scale_M=row_scale_M,
            )
        batch, tokens = count_BT.shape
        out_M1HR, _ = mla_decode(
            q_latent_BTHR.flatten(0, 1)[:, None],
            q_rope_BTHP.flatten(0, 1)[:, None],
            rows_MC[:, None],
            count_BT.flatten().int(),
            softmax_scale=scale,
            block_table=slot_BTK.flatten(0, 1).int(),
            cache_scale=None if row_scale_M is None else row_scale_M[:, None],
            check_indices=False,  # `choose_keys` made them
        )
        return out_M1HR.view(batch, tokens, *out_M1HR.shape[2:])
