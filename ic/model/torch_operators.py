"""The model's operators on PyTorch, and on Liger's kernels where a GPU and they are there.

Legend as in `ic.model.operators`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ic.model.labels import IGNORE_INDEX
from ic.model.loss import summed_linear_cross_entropy
from ic.model.masks import document_segments
from ic.model.operators import (
    AttentionOperators,
    Capabilities,
    FeedForwardOperators,
    FusedOperators,
    LossOperators,
    NormOperators,
    RotaryOperators,
)
from ic.model.rope import apply_rope
from ic.model.sdpa import Segments, causal_attention
from ic.model.sparse_operators import SparseOperators

try:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:  # the extra `gpu` is not installed
    LigerSiLUMulFunction = LigerFusedLinearCrossEntropyLoss = None


class TorchOperators(
    AttentionOperators,
    NormOperators,
    RotaryOperators,
    FeedForwardOperators,
    LossOperators,
    FusedOperators,
    SparseOperators,
):
    """Every part, on every machine; the reference of the other backends."""

    capabilities = Capabilities(
        mask=True,
        documents=True,
        row_lengths=False,
        quantised_cache=True,
        graph_capture=True,
        max_decode_queries=None,
    )

    def document_segments(self, document_ids_BT: Tensor) -> Segments:
        """Contiguous runs; one copy to the host."""
        return document_segments(document_ids_BT)

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
        return causal_attention(
            q_BTHK, k_BSHK, v_BSHV, scale=scale, mask_BTS=mask_BTS, segments=segments
        )

    def absorbed(
        self,
        q_latent_BTHR: Tensor,
        q_rope_BTHP: Tensor,
        cache_BSC: Tensor,
        *,
        scale: float,
        mask_BTS: Tensor | None = None,
        lengths_B: Tensor | None = None,
        cache_scale_BS: Tensor | None = None,
        block_table_BN: Tensor | None = None,
    ) -> Tensor:
        q_BTHC = torch.cat((q_latent_BTHR, q_rope_BTHP), dim=-1)
        if cache_scale_BS is not None:
            cache_BSC = (cache_BSC.float() * cache_scale_BS[..., None]).to(q_BTHC.dtype)
        keys, tokens = cache_BSC.shape[1], q_BTHC.shape[1]
        scores_BTHS = torch.einsum("bthc,bsc->bths", q_BTHC, cache_BSC) * scale
        visible = mask_BTS
        if visible is None and (tokens > 1 or lengths_B is not None):
            index = torch.arange(keys, device=q_BTHC.device)
            if lengths_B is None:
                visible = index <= index[keys - tokens :, None]
            else:
                visible = index < lengths_B[:, None, None] - index[:tokens].flip(0)[:, None]
        if visible is not None:
            scores_BTHS = scores_BTHS.masked_fill(~visible[..., None, :], -torch.inf)
        weights_BTHS = scores_BTHS.softmax(-1, dtype=torch.float32).to(cache_BSC.dtype)
        rank = q_latent_BTHR.shape[-1]
        return torch.einsum("bths,bsr->bthr", weights_BTHS, cache_BSC[..., :rank])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Autocast would return float32 here and double the residual stream's memory.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rotate(
        self, q_BTHP: Tensor, k_BT1P: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, *, interleave: bool
    ) -> tuple[Tensor, Tensor]:
        return (
            apply_rope(q_BTHP, cos_BTF, sin_BTF, interleave=interleave),
            apply_rope(k_BT1P, cos_BTF, sin_BTF, interleave=interleave),
        )

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Liger's kernel on a GPU keeps one activation less for the backward pass."""
        is_fused_by_compiler = torch.compiler.is_compiling()
        if gate.is_cuda and LigerSiLUMulFunction is not None and not is_fused_by_compiler:
            return LigerSiLUMulFunction.apply(gate, up)
        return F.silu(gate) * up

    def summed_linear_cross_entropy(
        self, hidden_MD: Tensor, weight_WD: Tensor, labels_M: Tensor
    ) -> Tensor:
        """On a GPU with Liger installed its fused kernel; elsewhere chunks of the tokens."""
        if hidden_MD.is_cuda and len(hidden_MD) and LigerFusedLinearCrossEntropyLoss is not None:
            fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
            return fused(weight_WD.to(hidden_MD.dtype), hidden_MD, labels_M)
        return summed_linear_cross_entropy(hidden_MD, weight_WD, labels_M)

    def norm_linear(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        norm_weight_D: Tensor,
        eps: float,
        weight_XD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        total_BTD = x_BTD if residual_BTD is None else x_BTD + residual_BTD
        return F.linear(self.rms_norm(total_BTD, norm_weight_D, eps), weight_XD), total_BTD

    def norm_swiglu(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        norm_weight_D: Tensor,
        eps: float,
        weight_2FD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        both, total_BTD = self.norm_linear(x_BTD, residual_BTD, norm_weight_D, eps, weight_2FD)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up, total_BTD

    def linear(self, x_BTD: Tensor, weight_XD: Tensor) -> Tensor:
        return F.linear(x_BTD, weight_XD)


OPERATORS = TorchOperators()


def has_liger() -> bool:
    """Whether Liger's kernels run on a GPU here."""
    return LigerSiLUMulFunction is not None
