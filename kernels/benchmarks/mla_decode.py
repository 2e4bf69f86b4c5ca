"""Benchmark cases of MLA decode: one query token, paged cache, the shapes of docs/kernels.md."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, Prepare, register
from ic.kernels.reference import gather_latent_cache, mla_decode_reference, quantize_per_token
from ic.kernels.triton_mla_flash_decode import mla_decode

SOFTMAX_SCALE = 1 / math.sqrt(128 + 64)
TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
CHUNK = 1 << 22


def make_inputs(
    device: torch.device, seed: int, *, batch: int, context: int, heads: int, latent: int,
    rope: int, cache_type: str, page_size: int | None,
) -> Inputs:  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    width = latent + rope
    query = torch.randn(
        batch, 1, heads, width, generator=generator, device=device, dtype=torch.bfloat16
    )
    rows = torch.randn(
        batch * context, width, generator=generator, device=device, dtype=torch.bfloat16
    )
    scale = None
    if cache_type != "bf16":
        quantized = torch.empty_like(rows, dtype=TYPES[cache_type])
        scale = torch.empty(batch * context, device=device)
        for first in range(0, len(rows), CHUNK // width):
            part = slice(first, first + CHUNK // width)
            quantized[part], scale[part] = quantize_per_token(rows[part], TYPES[cache_type])
        rows = quantized
    table = None
    if page_size is not None:
        pages = torch.randperm(batch * context // page_size, generator=generator, device=device)
        table = pages.int().view(batch, -1)
    shape = (-1, page_size, width) if page_size is not None else (batch, context, width)
    return {
        "q_latent_BQHR": query[..., :latent],
        "q_rope_BQHP": query[..., latent:],
        "cache": rows.view(shape),
        "seq_lens_B": torch.full((batch,), context, dtype=torch.int32, device=device),
        "softmax_scale": SOFTMAX_SCALE,
        "block_table": table,
        "cache_scale": None if scale is None else scale.view(shape[:2]),
    }


def ours(inputs: Inputs) -> Call:
    return partial(mla_decode, **inputs, check_indices=False)


def reference(inputs: Inputs) -> torch.Tensor:
    return mla_decode_reference(**inputs)[0]


def contiguous_rows(inputs: Inputs) -> torch.Tensor:
    """(B, S, R + P) in bf16: the cache without its pages, for peers that do not take them."""
    lengths = inputs["seq_lens_B"].tolist()
    rows = [
        gather_latent_cache(inputs["cache"], length, b, inputs["block_table"]).bfloat16()
        for b, length in enumerate(lengths)
    ]
    return torch.stack(rows)


def prepare_flash_mla(inputs: Inputs) -> Call:
    """FlashMLA's dense decode for sm_90 (sgl-flash-mla)."""
    flash_mla = importlib.import_module("flash_mla")

    latent = inputs["q_latent_BQHR"].shape[-1]
    if latent != 512 or inputs["cache"].dtype != torch.bfloat16 or inputs["cache"].shape[1] != 64:
        raise NotImplementedError("dense bf16 decode is 512+64 with pages of 64")
    query = torch.cat([inputs["q_latent_BQHR"], inputs["q_rope_BQHP"]], dim=-1)
    metadata, _ = flash_mla.get_mla_metadata()
    return lambda: flash_mla.flash_mla_with_kvcache(
        query, inputs["cache"][:, :, None], inputs["block_table"], inputs["seq_lens_B"], 512,
        metadata, softmax_scale=SOFTMAX_SCALE, use_legacy=True,
    )  # fmt: skip


def prepare_flash_attention_3(inputs: Inputs) -> Call:
    """FA3's decode through `qv`, contiguous; it needs a latent of 192 padded to 256."""
    flash_attention = importlib.import_module("fa3_fwd_interface")

    if inputs["cache"].dtype != torch.bfloat16:
        raise NotImplementedError("no fp8 latent cache with fp32 scales a token")
    latent = inputs["q_latent_BQHR"].shape[-1]
    rows = contiguous_rows(inputs)
    padding = (0, -latent % 256)
    values = torch.nn.functional.pad(rows[:, :, None, :latent], padding).contiguous()
    keys = rows[:, :, None, latent:].contiguous()
    query = torch.nn.functional.pad(inputs["q_latent_BQHR"], padding).contiguous()
    rope_query = inputs["q_rope_BQHP"].contiguous()

    def call() -> torch.Tensor:
        out: torch.Tensor = flash_attention.flash_attn_with_kvcache(
            rope_query, keys, values, qv=query, cache_seqlens=inputs["seq_lens_B"],
            softmax_scale=SOFTMAX_SCALE, causal=True,
        )  # fmt: skip
        return out[..., :latent]

    return call


def prepare_flashinfer(inputs: Inputs) -> Call:
    """FlashInfer's paged MLA decode, which is 512+64: a smaller latent is padded with zeros."""
    flashinfer = importlib.import_module("flashinfer")

    cache, table = inputs["cache"], inputs["block_table"]
    if cache.dtype != torch.bfloat16:
        raise NotImplementedError("no fp8 latent cache with fp32 scales a token")
    batch, _, heads, latent = inputs["q_latent_BQHR"].shape
    padding = (0, 512 - latent)
    latents = torch.nn.functional.pad(cache[..., :latent], padding).contiguous()
    keys = cache[..., latent:].contiguous()
    query = torch.nn.functional.pad(inputs["q_latent_BQHR"][:, 0], padding).contiguous()
    rope_query = inputs["q_rope_BQHP"][:, 0].contiguous()
    counts = torch.arange(batch + 1, dtype=torch.int32, device=cache.device)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=cache.device)
    )
    wrapper.plan(
        counts, counts * table.shape[1], table.flatten(), inputs["seq_lens_B"], heads, 512,
        keys.shape[-1], cache.shape[1], False, SOFTMAX_SCALE, query.dtype, cache.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(query, rope_query, latents, keys)[:, None, :, :latent]


PEERS: dict[str, Prepare] = {
    "FlashMLA": prepare_flash_mla,
    "FlashAttention-3": prepare_flash_attention_3,
    "FlashInfer": prepare_flashinfer,
}


def decode_case(
    batch: int, context: int, heads: int, latent: int, cache_type: str = "bf16", *, rope: int = 64,
    page_size: int | None = 64, baseline: str | None = None,
) -> BenchmarkCase:  # fmt: skip
    length = f"{context >> 20}M" if context >= 1 << 20 else f"{context >> 10}k"
    layout = (
        "" if page_size == 64 else ", contiguous" if page_size is None else f", page {page_size}"
    )
    config: dict[str, Any] = {
        "batch": batch, "context": context, "heads": heads, "latent": latent, "rope": rope,
        "cache_type": cache_type, "page_size": page_size,
    }  # fmt: skip
    row_bytes = (latent + rope) * (2 if cache_type == "bf16" else 1) + 4 * (cache_type != "bf16")
    return BenchmarkCase(
        kernel="mla_decode",
        name=f"({batch}, {length}) {heads} h {latent}+{rope} {cache_type}{layout}",
        config=config,
        make_inputs=partial(make_inputs, **config),
        ours=ours,
        reference=reference,
        bytes_moved=batch * context * row_bytes + batch * heads * (2 * latent + rope) * 2,
        flops=2 * batch * context * heads * (2 * latent + rope),
        tolerance=5e-3,
        peers=PEERS if page_size == 64 else {},
        baseline=baseline,
    )


@register("mla_decode")
def cases() -> Iterable[BenchmarkCase]:
    million, eighth = 1 << 20, 1 << 17
    yield decode_case(1, million, 16, 192)
    yield decode_case(1, eighth, 16, 192)
    yield decode_case(64, 4096, 16, 192)
    yield decode_case(1, million, 16, 192, "fp8", baseline="(1, 1M) 16 h 192+64 bf16")
    yield decode_case(1, million, 16, 192, "int8", baseline="(1, 1M) 16 h 192+64 bf16")
    yield decode_case(1, million, 16, 192, page_size=16)
    yield decode_case(1, million, 16, 192, page_size=None)
    yield decode_case(1, million, 16, 512)
    yield decode_case(1, eighth, 16, 512)
    yield decode_case(64, 4096, 16, 512)
    yield decode_case(128, 4096, 16, 512)
    yield decode_case(1, million, 16, 512, "fp8", baseline="(1, 1M) 16 h 512+64 bf16")
    for heads in (32, 64, 128):
        yield decode_case(128, 4096, heads, 512)
        for codes in ("fp8", "int8"):
            base = f"(128, 4k) {heads} h 512+64 bf16"
            yield decode_case(128, 4096, heads, 512, codes, baseline=base)
    yield decode_case(1, million, 128, 512)
    yield decode_case(1, million, 128, 512, "fp8", baseline="(1, 1M) 128 h 512+64 bf16")
    yield decode_case(128, 4096, 64, 192)
    for latent in (128, 192, 256, 448):
        yield decode_case(128, 4096, 128, latent)
    yield decode_case(128, 4096, 128, 192, "fp8", baseline="(128, 4k) 128 h 192+64 bf16")
