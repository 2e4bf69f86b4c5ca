"""vLLM's attention over the latent cache by our kernels.

vLLM's own backends take DeepSeek's dimensions: a latent of 192 with a rotary key of 64 is refused
in one place, has no gather of cached rows in another and no prefill in a third. Here decode is
`ic.kernels.triton_mla_flash_decode`, which reads pages through the block table and returns the
log-sum-exp, and prefill is `ic.serving.vllm_plugin.prefill`.

Legend: B requests, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, N qk_nope, V v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from ic.kernels import arguments
from ic.kernels.widths import LATENT_RULE, takes_latent
from ic.serving.vllm_plugin.prefill import PrefillAttention, gather_rows
from ic.serving.vllm_plugin.versions import prefill_lengths

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
# Whole tiles of the decode kernels lie in one page.
PAGE_TOKENS = 64


@dataclass
class LatentMetadata(MLACommonMetadata):
    """vLLM's, for any width of the cache.

    Attributes:
        prompts: of each request that is not decoded: new tokens, cached tokens before them.
    """

    prompts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """vLLM takes only the widths of its own backends here, whichever backend was chosen."""


class LatentMetadataBuilder(MLACommonMetadataBuilder):
    # One new token of each request; the kernel reads lengths and pages on the device.
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(
            kv_cache_spec, layer_names, vllm_config, device, metadata_cls=LatentMetadata
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> LatentMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.prompts = prefill_lengths(metadata, common_attn_metadata)
        return metadata


class LatentBackend(MLACommonBackend):
    """The backend CUSTOM of vLLM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any; `LatentImpl` knows rank and rotary width apart

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PAGE_TOKENS

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return True


def check_latent(rank: int, rope: int) -> None:
    """Raises ValueError where the decode kernel does not take a cache of these widths."""
    if not takes_latent(rank, rope):
        raise ValueError(
            f"kv_lora_rank={rank} and qk_rope_head_dim={rope}: {LATENT_RULE}; serve the model with "
            "`python -m ic serve attention=torch`"
        )


class LatentImpl(MLACommonImpl):
    """Writes, reads and attends to the latents of one layer."""

    can_return_lse_for_decode = True
    supports_dcp = True
    supports_quant_query_input = False
    # One buffer for all layers of a model: see `_token_scales`.
    _shared_scales: ClassVar[WeakValueDictionary[Any, Tensor]] = WeakValueDictionary()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_latent(self.kv_lora_rank, self.qk_rope_head_dim)
        # The kernels read e4m3 with queries in the model's own precision.
        self.supports_quant_query_input = False
        self._scales: Tensor | None = None
        self.is_e4m3 = self.kv_cache_dtype.startswith("fp8")
        config = get_current_vllm_config()
        if config.attention_config.use_prefill_query_quantization:
            raise ValueError(
                "use_prefill_query_quantization=true: our attention multiplies in the model's own "
                "precision; leave it out"
            )
        # vLLM's profile run sets memory aside for what `kv_b_proj` gives for so many tokens. We
        # hold the keys beside it.
        held = self.qk_nope_head_dim + self.v_head_dim
        tokens = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(config)
        self.prefill = PrefillAttention(
            self.scale,
            self._expand,
            max(tokens * held // (held + self.qk_head_dim), 1),
            (self.qk_head_dim, self.v_head_dim),
        )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False  # prefill writes the model's precision

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Write the rows of new tokens to their slots; one at -1 is written nowhere."""
        if kv_cache.is_cuda:
            super().do_kv_cache_update(
                kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale
            )
            return
        if not kv_cache.numel():
            return
        slots = slot_mapping.flatten()
        row_TC = torch.cat((kv_c_normed, k_pe.flatten(1)), dim=-1)[: len(slots)]
        if self.is_e4m3:
            # The conversion of PyTorch makes what lies beyond the largest number NaN.
            row_TC = (row_TC / k_scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
            row_TC = row_TC.to(E4M3).view(torch.uint8)
        written = slots >= 0
        slots, page_tokens = slots[written], kv_cache.shape[1]
        kv_cache[slots // page_tokens, slots % page_tokens] = row_TC[written].to(kv_cache.dtype)

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: LatentMetadata,
        layer: Any,
    ) -> tuple[Tensor, Tensor]:
        """Decode: absorbed queries (B, H, C) over the cache -> out (B, H, R) and log-sum-exp
        (B, H), float32.
        """
        parts = [self.kv_lora_rank, self.qk_rope_head_dim]
        q_BHR, q_BHP = q.split(parts, -1) if isinstance(q, Tensor) else q
        cache, decode = kv_c_and_k_pe_cache, attn_metadata.decode
        assert decode is not None
        if not (cache.is_cuda or arguments.INTERPRETED):
            return self._decode_on_cpu(q_BHR, q_BHP, cache, decode, layer)
        from ic.kernels.triton_mla_flash_decode import mla_decode

        out, lse = mla_decode(
            q_BHR[:, None],
            q_BHP[:, None],
            cache,
            decode.seq_lens,
            softmax_scale=self.scale,
            block_table=decode.block_table,
            cache_scale=self._token_scales(cache, layer) if self.is_e4m3 else None,
            max_context_tokens=attn_metadata.max_seq_len,
            check_indices=False,  # vLLM made them; no wait for the device
        )
        return out[:, 0], lse[:, 0]

    def _decode_on_cpu(
        self, q_BHR: Tensor, q_BHP: Tensor, cache: Tensor, decode: Any, layer: Any
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for row, length in enumerate(decode.seq_lens.tolist()):
            row_SC = gather_rows(cache, decode.block_table[row], 0, length, layer._k_scale_float)
            row_SC = row_SC.to(q_BHR.dtype)
            q_HC = torch.cat((q_BHR[row], q_BHP[row]), dim=-1)
            score_HS = (q_HC @ row_SC.T).float() * self.scale
            lses.append(score_HS.logsumexp(-1))
            weight_HS = (score_HS - lses[-1][:, None]).exp().to(row_SC.dtype)
            outs.append(weight_HS @ row_SC[:, : self.kv_lora_rank])
        return torch.stack(outs), torch.stack(lses)

    def _token_scales(self, cache: Tensor, layer: Any) -> Tensor:
        """The factor of each token, of which the kernel reads one: all are the layer's."""
        if self._scales is None:
            key = (cache.shape[:2], cache.device, layer._k_scale_float)
            scales = self._shared_scales.get(key)
            if scales is None:
                scales = torch.full(cache.shape[:2], layer._k_scale_float, device=cache.device)
                self._shared_scales[key] = scales
            self._scales = scales
        return self._scales

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: LatentMetadata,
        k_scale: Tensor,
        output: Tensor,
        output_scale: Tensor | None = None,
    ) -> None:
        """Prefill: writes the attention of new tokens, of one or several requests, to `output`."""
        if self.dcp_world_size > 1:  # each rank holds a part of a request's rows
            super().forward_mha(
                q,
                kv_c_normed,
                k_pe,
                kv_c_and_k_pe_cache,
                attn_metadata,
                k_scale,
                output,
                output_scale,
            )
            return
        latent_TR, k_rope_TP = kv_c_normed, k_pe.flatten(1)
        out_THV = output.view(-1, self.num_heads, self.v_head_dim)
        assert attn_metadata.prefill is not None
        pages_BX = attn_metadata.prefill.block_table
        first = request = 0
        for is_fresh, prompts in groupby(attn_metadata.prompts, lambda prompt: prompt[1] == 0):
            run = list(prompts)
            # Requests without cached tokens attend in one call, the others one by one.
            for some in [run] if is_fresh else [[prompt] for prompt in run]:
                last = first + sum(new for new, _ in some)
                given = q[first:last], latent_TR[first:last], k_rope_TP[first:last]
                if is_fresh:
                    out = self.prefill.fresh(*given, [new for new, _ in some])
                else:
                    context = partial(
                        gather_rows, kv_c_and_k_pe_cache, pages_BX[request], scale=k_scale
                    )
                    out = self.prefill.continued(*given, context, some[0][1])
                out_THV[first:last] = out
                first, request = last, request + len(some)

    def _expand(self, latent_SR: Tensor, k_rope_SP: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b_proj(latent_SR)[0].view(len(latent_SR), self.num_heads, -1)
        k_nope, v_SHV = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return self._concat_k_nope_k_pe(k_nope, k_rope_SP[:, None]), v_SHV


class OwnPrefill(MLAPrefillBackend):
    """Stands where vLLM asks for its own prefill and has none for the model's dimensions:
    `LatentImpl.forward_mha` attends without it.
    """

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parallel = self.vllm_config.parallel_config.decode_context_parallel_size
        widths = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)
        if parallel > 1:
            raise ValueError(
                f"decode_context_parallel_size={parallel}: vLLM has no prefill for "
                f"qk_nope_head_dim, qk_rope_head_dim and v_head_dim of {widths}, which it takes "
                "there; use 1"
            )

    def run_prefill_new_tokens(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "vLLM has no prefill for these dimensions: use attention_backend=CUSTOM, which has one"
        )

    run_prefill_context_chunk = run_prefill_new_tokens
