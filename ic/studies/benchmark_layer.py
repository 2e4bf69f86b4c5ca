"""Decode of one layer through the model: InfiniteContext-1B's attention, 128k cached tokens, bf16.

Everything between the layer's input and output counts: projections, norm, rotation, append to the
cache, attention, output projection. "ours" has attention, norm and rotation on the Triton kernels;
"PyTorch, eager" is the same module with all three on PyTorch's operators, launched from Python.
"ours, eager" is ours launched from Python too; a serving loop replays a graph. The cache is cropped
before every call, so each one appends the same token again.

The tolerance is twice that of a single kernel: a layer rounds to bf16 six times one after another
(query, absorbed query, rotation, latent, attention, values), and the reference, the same module in
fp32, never.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, register
from ic.model.attention import MLAAttention
from ic.model.build_context import ContextBuilder
from ic.model.cache import LatentCache
from ic.model.config import MLAConfig
from ic.model.operators import choose_operators
from ic.model.rope import DecoupledRotaryEmbedding

CONTEXT_TOKENS = 1 << 17
PARTS = ("attention_backend", "norm_backend", "rope_backend")
ON_TORCH: dict[str, Any] = dict.fromkeys(PARTS, "torch")
ON_TRITON: dict[str, Any] = dict.fromkeys(PARTS, "triton")


def make_config(backends: dict[str, Any], **sizes: Any) -> MLAConfig:
    """InfiniteContext-1B as `conf/model/mla_1b.yaml` has it, one layer of it."""
    return MLAConfig(num_hidden_layers=1, length_temperature="ssmax", **backends, **sizes)


def _make_inputs(
    context: int,
    sizes: dict[str, Any],
    device: torch.device,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    config = make_config(ON_TORCH, **sizes)
    layer = MLAAttention(config, 0, choose_operators(config)).to(device, dtype)
    for name, parameter in layer.named_parameters():
        data = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() > 1:
            parameter.data = (data * parameter.shape[-1] ** -0.5).to(dtype)
        else:
            neutral = 0.15 if name.endswith("scale") else 1.0
            parameter.data = (neutral * (1 + data / 8)).to(dtype)
    width, rank = config.latent_dim, config.kv_lora_rank
    rows = torch.randn(1, 1, context - 1, width, generator=generator, device=device, dtype=dtype)
    cache = LatentCache(1, capacity_tokens=context)
    cache.update(rows[..., :rank], rows[..., rank:], 0)
    hidden = torch.randn(1, 1, config.hidden_size, generator=generator, device=device, dtype=dtype)
    return {"layer": layer, "cache": cache, "hidden": hidden, "config": config, "past": context - 1}


def _call(backends: dict[str, Any], dtype: torch.dtype | None, inputs: Inputs) -> Call:
    """Decode of one token with the layer's weights on other backends, or in another dtype."""
    hidden, cache = inputs["hidden"], inputs["cache"]
    dtype = dtype or hidden.dtype
    config = MLAConfig.from_dict(inputs["config"].to_dict() | backends)
    operators = choose_operators(config)
    layer = MLAAttention(config, 0, operators).to(hidden.device, dtype).requires_grad_(False)
    layer.load_state_dict(inputs["layer"].state_dict())
    rank, past = config.kv_lora_rank, inputs["past"]
    if dtype != hidden.dtype:
        rows = cache.layers[0].latents()[:, None, :past].to(dtype)
        cache = LatentCache(1, capacity_tokens=past + 1)
        cache.update(rows[..., :rank], rows[..., rank:], 0)
    hidden = hidden.to(dtype)
    cache.keep(past)
    builder = ContextBuilder(config, operators, DecoupledRotaryEmbedding(config))
    context = builder.build(1, 1, hidden.device, cache)

    @torch.no_grad()
    def call() -> torch.Tensor:
        cache.keep(past)
        return layer(hidden, context, cache)

    return call


def _case(context: int, **sizes: Any) -> BenchmarkCase:
    config = make_config(ON_TORCH, **sizes)
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    matrices = (
        config.hidden_size * (heads * config.qk_head_dim + config.latent_dim)
        + rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * config.hidden_size
    )
    return BenchmarkCase(
        kernel="layer",
        name=f"decode (1, {context // 1024}k) {heads} h {rank}+{config.qk_rope_head_dim}",
        config={
            "batch": 1,
            "context": context,
            "heads": heads,
            "hidden": config.hidden_size,
            "latent": rank,
            "rope": config.qk_rope_head_dim,
        },
        make_inputs=partial(_make_inputs, context, sizes),
        ours=partial(_call, ON_TRITON, None),
        reference=lambda inputs: _call(ON_TORCH, torch.float32, inputs)(),
        peers={
            "PyTorch, eager": partial(_call, ON_TORCH, None),
            "ours, eager": partial(_call, ON_TRITON, None),
        },
        launched_from_python=frozenset({"PyTorch, eager", "ours, eager"}),
        bytes_moved=2 * (context * config.latent_dim + matrices),
        flops=2 * (context * heads * (2 * rank + config.qk_rope_head_dim) + matrices),
        tolerance=1e-2,
    )


@register("layer")
def cases() -> Iterable[BenchmarkCase]:
    yield _case(CONTEXT_TOKENS)
    yield _case(CONTEXT_TOKENS // 8)
