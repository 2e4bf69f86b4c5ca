"""Checks of what a user hands to `triton_mla_flash_decode` and `triton_append_latent`."""

from __future__ import annotations

import torch
import triton

from ic.kernels.arguments import require
from ic.kernels.mla_decode_launch import MAX_QUERY_TOKENS
from ic.kernels.widths import LATENT_RULE, takes_latent


def check_decode_arguments(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_scale: torch.Tensor | None,
) -> None:
    """Everything that can be checked without waiting for the device. Raises ValueError."""
    require(q_latent.dim() == 4, f"q_latent has shape {tuple(q_latent.shape)}; want (B, Q, H, R)")
    B, Q, H, R = q_latent.shape
    require(
        q_rope.dim() == 4 and q_rope.shape[:3] == q_latent.shape[:3],
        f"q_rope has shape {tuple(q_rope.shape)}; want ({B}, {Q}, {H}, P) as q_latent",
    )
    P = q_rope.shape[3]
    require(
        1 <= Q <= MAX_QUERY_TOKENS,
        f"q_latent has {Q} query tokens; decode takes 1 to {MAX_QUERY_TOKENS}, prefill the rest",
    )
    require(
        takes_latent(R, P),
        f"q_latent and q_rope have latent and rope dimensions {R} and {P}; {LATENT_RULE}",
    )
    require(
        q_latent.dtype in (torch.bfloat16, torch.float16, torch.float32),
        f"q_latent is {q_latent.dtype}; allowed are bfloat16, float16 and float32",
    )
    require(
        q_rope.dtype == q_latent.dtype, f"q_rope is {q_rope.dtype}, but q_latent {q_latent.dtype}"
    )
    _check_cache(q_latent, cache, cache_scale, R + P, block_table)
    named = {
        "q_latent": q_latent, "q_rope": q_rope, "cache": cache, "seq_lens": seq_lens,
        "block_table": block_table, "cache_scale": cache_scale,
    }  # fmt: skip
    check_devices(named)
    for name in ("q_latent", "q_rope", "cache"):
        tensor = named[name]
        assert tensor is not None
        require(
            tensor.shape[-1] <= 1 or tensor.stride(-1) == 1,
            f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1",
        )
    require(cache.stride(1) < 2**24, f"cache has stride {cache.stride(1)} between tokens; < 2^24")
    require(
        seq_lens.dtype == torch.int32 and seq_lens.shape == (B,) and seq_lens.is_contiguous(),
        f"seq_lens is {seq_lens.dtype} {tuple(seq_lens.shape)}; want contiguous int32 ({B},)",
    )


def _check_cache(
    q_latent: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    width: int,
    block_table: torch.Tensor | None,
) -> None:
    B = q_latent.shape[0]
    require(
        cache.dim() == 3 and cache.shape[2] == width,
        f"cache has shape {tuple(cache.shape)}; its last dimension must be R + P = {width}",
    )
    if cache_scale is None:
        require(
            cache.dtype == q_latent.dtype,
            f"cache is {cache.dtype}, but q_latent {q_latent.dtype}; if quantised pass cache_scale",
        )
    else:
        require(
            cache.dtype in (torch.float8_e4m3fn, torch.int8),
            f"cache is {cache.dtype}; with cache_scale it must be float8_e4m3fn or int8",
        )
        require(
            cache_scale.dtype == torch.float32 and cache_scale.shape == cache.shape[:2],
            f"cache_scale is {cache_scale.dtype} {tuple(cache_scale.shape)}; "
            f"want float32 {tuple(cache.shape[:2])}",
        )
    if block_table is None:
        require(
            cache.shape[0] == B, f"cache holds {cache.shape[0]} sequences, but q_latent has {B}"
        )
        return
    require(
        cache.shape[1] == 1 or (cache.shape[1] >= 16 and cache.shape[1] % 16 == 0),
        f"cache has page size {cache.shape[1]}; it must be a multiple of 16, or 1",
    )
    require(cache.shape[0] >= 1, "cache has no page")
    require(
        block_table.dtype == torch.int32
        and block_table.dim() == 2
        and block_table.shape[0] == B
        and (block_table.shape[1] <= 1 or block_table.stride(1) == 1),
        f"block_table is {block_table.dtype} {tuple(block_table.shape)} with strides "
        f"{block_table.stride()}; want int32 ({B}, max_pages) with contiguous rows",
    )


def check_devices(named: dict[str, torch.Tensor | None]) -> None:
    """All on one CUDA device (or on the CPU in interpreter mode). Raises ValueError."""
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        require(
            tensor.device == first.device,
            f"{name} is on {tensor.device}, but {first_name} on {first.device}",
        )
    require(
        first.is_cuda or triton.knobs.runtime.interpret,
        f"{first_name} is on {first.device}; the Triton kernel needs a CUDA device "
        "(or TRITON_INTERPRET=1)",
    )


def check_decode_indices(
    cache: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    """Lengths and page numbers, which live on the device. Raises ValueError."""
    if seq_lens.numel() == 0:
        return
    capacity = cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]
    low, high = int(seq_lens.min()), int(seq_lens.max())
    require(low >= 0, f"seq_lens holds {low}; lengths must be at least 0")
    require(high <= capacity, f"seq_lens holds {high}; the cache holds {capacity} tokens at most")
    if block_table is not None and high > 0:
        used = torch.arange(block_table.shape[1], device=block_table.device) * cache.shape[1]
        pages = block_table.masked_fill(used >= seq_lens[:, None], 0)
        low, high = int(pages.min()), int(pages.max())
        require(
            low >= 0 and high < cache.shape[0],
            f"block_table holds page {low if low < 0 else high}; "
            f"the cache has {cache.shape[0]} pages",
        )
