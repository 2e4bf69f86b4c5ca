"""Benchmark cases of the fused append: one decode step of a large batch and a prefill chunk."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, register
from ic.kernels.reference import append_latent_reference, quantize_per_token, rotate_pairs
from ic.kernels.triton_append_latent import append_latent


def make_inputs(
    device: torch.device, seed: int, *, num_tokens: int, latent: int, rope: int, cache_type: str
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    projected = torch.randn(
        num_tokens, latent + rope, generator=generator, device=device, dtype=torch.bfloat16
    )
    angle = torch.rand(num_tokens, rope // 2, generator=generator, device=device) * 1e5
    num_pages = max(num_tokens // 64, 1) * 2
    dtype = torch.bfloat16 if cache_type == "bf16" else torch.float8_e4m3fn
    inputs: Inputs = {
        "latent_TR": projected[:, :latent],
        "rope_key_TP": projected[:, latent:],
        "weight_R": torch.rand(latent, generator=generator, device=device).bfloat16() + 0.5,
        "cos_TF": angle.cos(),
        "sin_TF": angle.sin(),
        "cache": torch.zeros(num_pages, 64, latent + rope, device=device).to(dtype),
        "slot_mapping_T": torch.randperm(num_pages * 64, generator=generator, device=device)[
            :num_tokens
        ],
    }
    if cache_type != "bf16":
        inputs["cache_scale"] = torch.zeros(num_pages, 64, device=device)
    return inputs


def written(inputs: Inputs) -> torch.Tensor:
    rows = inputs["cache"].float()
    if "cache_scale" in inputs:
        rows = rows * inputs["cache_scale"][..., None]
    return rows


def ours(inputs: Inputs) -> Call:
    """Returns the cache's rows on the first call, which is compared; then only appends."""
    checked: list[bool] = []

    def call() -> torch.Tensor | None:
        append_latent(**inputs, check_indices=False)
        if checked:
            return None
        checked.append(True)
        return written(inputs)

    return call


def eager(inputs: Inputs) -> Call:
    """The same in PyTorch's operators, as a serving path without a fused kernel does it."""
    slots, cache = inputs["slot_mapping_T"], inputs["cache"]
    page, place = slots // cache.shape[1], slots % cache.shape[1]
    latent_dim = inputs["latent_TR"].shape[1]
    checked: list[bool] = []

    def call() -> torch.Tensor | None:
        latent = torch.nn.functional.rms_norm(
            inputs["latent_TR"], (latent_dim,), inputs["weight_R"], 1e-6
        )
        key = rotate_pairs(inputs["rope_key_TP"].float(), inputs["cos_TF"], inputs["sin_TF"], True)
        rows = torch.cat([latent, key.to(latent.dtype)], dim=-1)
        if "cache_scale" in inputs:
            quantized, scale = quantize_per_token(rows, cache.dtype)
            cache.view(torch.uint8)[page, place] = quantized.view(torch.uint8)
            inputs["cache_scale"][page, place] = scale
        else:
            cache[page, place] = rows
        if checked:
            return None
        checked.append(True)
        return written(inputs)

    return call


def reference(inputs: Inputs) -> torch.Tensor:
    copy = inputs | {"cache": torch.zeros_like(inputs["cache"], dtype=torch.float32)}
    copy.pop("cache_scale", None)
    append_latent_reference(**copy)
    return copy["cache"]


def append_case(num_tokens: int, latent: int, cache_type: str) -> BenchmarkCase:
    rope = 64
    itemsize = 2 if cache_type == "bf16" else 1
    token_bytes = (latent + rope) * (2 + itemsize) + rope * 4 + 8 + 4 * (itemsize == 1)
    config: dict[str, Any] = {
        "num_tokens": num_tokens,
        "latent": latent,
        "rope": rope,
        "cache_type": cache_type,
    }
    return BenchmarkCase(
        kernel="append_latent",
        name=f"{num_tokens} tokens {latent}+{rope} {cache_type}",
        config=config,
        make_inputs=partial(make_inputs, **config),
        ours=ours,
        reference=reference,
        bytes_moved=num_tokens * token_bytes,
        flops=0,
        tolerance=5e-3 if cache_type == "bf16" else 5e-2,
        peers={"PyTorch eager": eager},
    )


@register("append_latent")
def cases() -> Iterable[BenchmarkCase]:
    yield append_case(128, 192, "bf16")
    yield append_case(16384, 192, "bf16")
    yield append_case(16384, 512, "bf16")
    yield append_case(16384, 192, "fp8")
