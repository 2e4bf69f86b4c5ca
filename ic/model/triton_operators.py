"""The model's attention, norm, rotation and append on our Triton kernels.

Legend as in `ic.model.operators`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ic.kernels.mla_decode_launch import MAX_QUERY_TOKENS
from ic.kernels.triton_append_latent import append_latent
from ic.kernels.triton_matvec import matvec
from ic.kernels.triton_mla_attention import mla_attention
from ic.kernels.triton_mla_flash_decode import mla_decode
from ic.kernels.triton_new_tokens import append_with_queries
from ic.kernels.triton_rmsnorm import add_rms_norm, rms_norm
from ic.kernels.triton_rope import apply_rope
from ic.kernels.triton_silu_mul import silu_mul_halves
from ic.kernels.widths import is_power, refusal
from ic.model.config import MLAConfig
from ic.model.operators import (
    AppendOperators,
    AttentionOperators,
    Capabilities,
    FusedOperators,
    NewQueries,
    NewTokens,
    NormOperators,
    RotaryOperators,
)
from ic.model.sdpa import Segments
from ic.model.triton_sparse import TritonSparseOperators


class TritonOperators(
    AttentionOperators,
    NormOperators,
    RotaryOperators,
    AppendOperators,
    FusedOperators,
    TritonSparseOperators,
):
    """On a CUDA GPU from sm_80 on, or in Triton's interpreter."""

    capabilities = Capabilities(
        mask=False,
        documents=True,
        row_lengths=True,
        quantised_cache=True,
        graph_capture=True,
        max_decode_queries=MAX_QUERY_TOKENS,
        block_table=True,
    )

    def check_attention(self, config: MLAConfig) -> None:
        why_not = refusal(
            config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        )
        if why_not is not None:
            raise ValueError(f"{why_not}; use attention=torch")

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
        assert mask_BTS is None
        # The kernel finds the documents' bounds itself, without a copy to the host.
        ids = None if document_ids_BT is None else document_ids_BT.int().contiguous()
        return mla_attention(q_BTHK, k_BSHK, v_BSHV, scale=scale, document_ids=ids)

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
        assert mask_BTS is None
        if lengths_B is None:
            batch, keys = cache_BSC.shape[:2]
            lengths_B = torch.full((batch,), keys, dtype=torch.int32, device=cache_BSC.device)
        out_BTHR, _ = mla_decode(
            q_latent_BTHR,
            q_rope_BTHP,
            cache_BSC,
            lengths_B,
            softmax_scale=scale,
            block_table=block_table_BN,
            cache_scale=cache_scale_BS,
            check_indices=False,  # the context's maker made the lengths; no wait for them
        )
        return out_BTHR

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def norm_linear(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        norm_weight_D: Tensor,
        eps: float,
        weight_XD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if _is_one_row(x_BTD):
            return matvec(
                x_BTD, weight_XD, norm_weight=norm_weight_D, residual=residual_BTD, eps=eps
            )
        if residual_BTD is None:
            normed_BTD, total_BTD = rms_norm(x_BTD, norm_weight_D, eps), x_BTD
        else:
            normed_BTD, total_BTD = add_rms_norm(x_BTD, residual_BTD, norm_weight_D, eps)
        return F.linear(normed_BTD, weight_XD), total_BTD

    def norm_swiglu(
        self,
        x_BTD: Tensor,
        residual_BTD: Tensor | None,
        norm_weight_D: Tensor,
        eps: float,
        weight_2FD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if _is_one_row(x_BTD):
            return matvec(
                x_BTD, weight_2FD, norm_weight=norm_weight_D, residual=residual_BTD, eps=eps,
                swiglu=True,
            )  # fmt: skip
        both, total_BTD = self.norm_linear(x_BTD, residual_BTD, norm_weight_D, eps, weight_2FD)
        return silu_mul_halves(both), total_BTD

    def linear(self, x_BTD: Tensor, weight_XD: Tensor) -> Tensor:
        if _is_one_row(x_BTD):
            return matvec(x_BTD.contiguous(), weight_XD)[0]
        return F.linear(x_BTD, weight_XD)

    def check_rotation(self, config: MLAConfig) -> None:
        if not is_power(config.qk_rope_head_dim):
            raise ValueError(
                f"qk_rope_head_dim={config.qk_rope_head_dim}: the Triton rotation takes powers of "
                "two from 16 on; use rope=torch"
            )

    def rotate(
        self, q_BTHP: Tensor, k_BT1P: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, *, interleave: bool
    ) -> tuple[Tensor, Tensor]:
        """One launch for both, which are read in place."""
        return apply_rope(q_BTHP, k_BT1P, cos_BTF, sin_BTF, interleave)

    def accepts_append(self, config: MLAConfig) -> bool:
        return config.kv_lora_rank % 8 == 0 and config.latent_dim <= 1024

    def append(
        self,
        new: NewTokens,
        weight_R: Tensor,
        pages: Tensor,
        *,
        eps: float,
        interleave: bool,
        cache_scale: Tensor | None = None,
        queries: NewQueries | None = None,
    ) -> None:
        if queries is not None:
            append_with_queries(
                queries.q_MHK,
                new.latent_MR,
                new.k_rope_MP,
                weight_R,
                new.cos_MF,
                new.sin_MF,
                pages,
                new.slots_M,
                temperature=queries.temperature,
                temperature_scale_H=queries.scale_H,
                visible_M=queries.visible_M,
                beta=queries.beta,
                original=queries.original,
                eps=eps,
                interleaved=interleave,
                cache_scale=cache_scale,
            )
            return
        append_latent(
            new.latent_MR,
            new.k_rope_MP,
            weight_R,
            new.cos_MF,
            new.sin_MF,
            pages,
            new.slots_M,
            eps=eps,
            interleaved=interleave,
            cache_scale=cache_scale,
            check_indices=False,  # made for pages of this batch
        )


def _is_one_row(x_BTD: Tensor) -> bool:
    """Where a product reads its matrix once and computes next to nothing."""
    return x_BTD.numel() == x_BTD.shape[-1]


OPERATORS = TritonOperators()
