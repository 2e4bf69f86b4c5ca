"""Our language model of vLLM's parallel layers: every extension of `MLAConfig`, heads split over
the ranks of tensor parallelism.

The parameters have the names of a checkpoint, so its tensors find their places without a map, and a
quantised checkpoint's modules too. Rotation, length temperature and the norms of query and key are
`ic.model`'s own.

Legend: T tokens of all requests, D hidden, H heads of this rank, N qk_nope, P qk_rope, K = N + P,
V v_head, R kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.v1.attention.backends.mla.prefill import get_mla_prefill_backend
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ic.model.attention import LengthTemperature
from ic.model.config import MLAConfig
from ic.model.indexer_options import INDEXER_WEIGHTS
from ic.model.operators import load_operators
from ic.model.qk_norm import KeyNorm, QueryNorm
from ic.model.rope import DecoupledRotaryEmbedding, apply_rope
from ic.serving.vllm_plugin.backend import LatentBackend

# DeepSeek's, and not `rms_norm_eps`, where a latent is normalised.
LATENT_EPS = 1e-6


class Attention(nn.Module):
    """`ic.model.attention.MLAAttention`, whose cache and products are vLLM's `MLAAttention`."""

    def __init__(self, config: MLAConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.rotate = layer not in (config.nope_layers or [])
        ranks = get_tensor_model_parallel_world_size()
        heads, self.num_heads = config.num_attention_heads, config.num_attention_heads // ranks
        first = get_tensor_model_parallel_rank() * self.num_heads
        self.heads = slice(first, first + self.num_heads)
        hidden, bias = config.hidden_size, config.attention_bias

        def named(name: str) -> dict[str, Any]:
            return {"quant_config": vllm_config.quant_config, "prefix": f"{prefix}.{name}"}

        width = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(
                hidden, width, bias=config.query_bias, **named("q_proj")
            )
        else:
            rank = config.q_lora_rank
            self.q_a_proj = ReplicatedLinear(hidden, rank, bias=bias, **named("q_a_proj"))
            self.q_a_layernorm = RMSNorm(rank, eps=LATENT_EPS)
            self.q_b_proj = ColumnParallelLinear(rank, width, bias=False, **named("q_b_proj"))
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden, config.latent_dim, bias=bias, **named("kv_a_proj_with_mqa")
        )
        if config.latent_norm:
            self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=LATENT_EPS)
        if config.qk_norm_dim is not None:
            norm = load_operators("torch")
            self.q_norm, self.k_norm = QueryNorm(config, norm), KeyNorm(config, norm)
        self.kv_b_proj = ColumnParallelLinear(
            config.kv_lora_rank,
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            bias=False,
            **named("kv_b_proj"),
        )
        self.o_proj = RowParallelLinear(
            heads * config.v_head_dim, hidden, bias=bias, **named("o_proj")
        )
        if config.length_temperature != "none":
            self.length_temperature = LengthTemperature(config)
        chosen = vllm_config.attention_config.backend
        is_ours = chosen in (None, AttentionBackendEnum.CUSTOM)
        self.attn = MLAAttention(
            num_heads=self.num_heads,
            scale=config.softmax_scale,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=LatentBackend if is_ours else None,
        )

    def forward(
        self, hidden_TD: Tensor, cos_1TF: Tensor, sin_1TF: Tensor, visible_1T: Tensor
    ) -> Tensor:
        config = self.config
        parts = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        if config.q_lora_rank is None:
            q = self.q_proj(hidden_TD)[0]
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_TD)[0]))[0]
        q_nope, q_rope = q.view(len(hidden_TD), self.num_heads, -1).split(parts, -1)
        latent_TR, k_rope_TP = self.kv_a_proj_with_mqa(hidden_TD)[0].split(
            [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        latent_TR = latent_TR.contiguous()
        if config.latent_norm:
            latent_TR = self.kv_a_layernorm(latent_TR)
        if config.qk_norm_dim is not None:
            q_rope, k_rope_TP = self.q_norm(q_rope), self.k_norm(k_rope_TP)
        if config.length_temperature != "none":
            factor = self.length_temperature(visible_1T)[0]
            if config.length_temperature == "ssmax":
                factor = factor[:, self.heads]
            q_nope, q_rope = ((x * factor).to(x.dtype) for x in (q_nope, q_rope))
        k_rope = k_rope_TP[:, None]
        if self.rotate:
            q_rope, k_rope = (
                apply_rope(x[None], cos_1TF, sin_1TF, interleave=config.rope_interleave)[0]
                for x in (q_rope, k_rope)
            )
        out = self.attn(
            torch.cat((q_nope, q_rope), dim=-1),
            latent_TR,
            k_rope,
            output_shape=(len(hidden_TD), self.num_heads * config.v_head_dim),
        )
        return self.o_proj(out)[0]


class FeedForward(nn.Module):
    """SwiGLU; both projections that begin it are one product."""

    def __init__(self, config: MLAConfig, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [width, width],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            width, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.silu_mul = SiluAndMul()

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.down_proj(self.silu_mul(self.gate_up_proj(hidden_TD)[0]))[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: MLAConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, vllm_config, f"{prefix}.self_attn")
        self.mlp = FeedForward(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, *shared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the layer adds, and the sum of all before it."""
        if residual_TD is None:
            residual_TD, hidden_TD = hidden_TD, self.input_layernorm(hidden_TD)
        else:
            hidden_TD, residual_TD = self.input_layernorm(hidden_TD, residual_TD)
        hidden_TD = self.self_attn(hidden_TD, *shared)
        hidden_TD, residual_TD = self.post_attention_layernorm(hidden_TD, residual_TD)
        return self.mlp(hidden_TD), residual_TD


# The tokens of a pass, which `torch.compile` must not take for constants.
@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": -1,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class MLAModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = our_config(vllm_config.model_config.hf_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, vllm_config, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DecoupledRotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (T, D) of tokens at their positions in their requests."""
        hidden_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # However a prompt is cut, a token at position p sees p + 1 tokens.
        shared = (*self.rotary_emb(positions[None]), positions[None] + 1)
        residual_TD = None
        for layer in self.layers:
            hidden_TD, residual_TD = layer(hidden_TD, residual_TD, *shared)
        return self.norm(hidden_TD, residual_TD)[0]


class MLAForCausalLM(nn.Module, SupportsQuant):
    """The model that vLLM builds for the architecture `MLAForCausalLM`."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = our_config(vllm_config.model_config.hf_config)
        if config.indexer == "sparse":
            raise ValueError(
                "indexer=sparse in the model's config.json: vLLM has no cache for our index keys; "
                'serve with backend=engine, or write "indexer": "dense" there for dense attention'
            )
        ranks = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % ranks:
            raise ValueError(
                f"tensor_parallel_size={ranks}: does not divide the model's "
                f"{config.num_attention_heads} heads"
            )
        take_prefill(vllm_config)
        below = f"{prefix}." if prefix else ""
        self.model = MLAModel(vllm_config=vllm_config, prefix=f"{below}model")
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{below}lm_head",
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors -> the names of the parameters that have been given.

        Raises:
            ValueError: a tensor that the model has no place for.
        """
        parameters, given = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if INDEXER_WEIGHTS in name and self.config.indexer == "dense":
                continue  # attention does not ask it
            target, part = name, list[int]()
            for index, piece in enumerate(self.packed_modules_mapping["gate_up_proj"]):
                if f".{piece}." in name:
                    target, part = name.replace(piece, "gate_up_proj"), [index]
            if target not in parameters:
                raise ValueError(
                    f"the checkpoint has {name}, for which MLAForCausalLM has no place: its "
                    "config.json describes another model"
                )
            parameter = parameters[target]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, tensor, *part)
            given.add(target)
        return given


def our_config(config: Any) -> MLAConfig:
    """`MLAConfig` of a folder of ours, or of one in DeepSeek's form.

    Raises:
        ValueError: a model that ours does not compute, such as a mixture of experts.
    """
    if isinstance(config, MLAConfig):
        return config
    return MLAConfig.from_dict(config.to_dict())


def take_prefill(vllm_config: VllmConfig) -> None:
    """Put ours where vLLM has no prefill for the model's dimensions on this device."""
    try:
        get_mla_prefill_backend(vllm_config)
    except ValueError:
        vllm_config.attention_config.mla_prefill_backend = MLAPrefillBackendEnum.CUSTOM
