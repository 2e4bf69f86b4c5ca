"""One kernel from projection to cache: normalise the latent, rotate the shared key, append both.

T new tokens, R kv_lora_rank, P qk_rope_head_dim, F = P/2 frequencies.

What. For each new token, with x the latent and k the shared rope key of `kv_a_proj_with_mqa`,

    c = [ x * rsqrt(mean(x^2) + eps) * weight | rotate(k, cos, sin) ]

is written to slot `slot_mapping[t]` of the paged cache: page slot // page_size, place slot %
page_size. Rotation pairs are (2i, 2i+1) (interleaved, DeepSeek's) or (i, i + P/2) (half-split,
Hugging Face's); each pair stays where it was. A quantised cache (e4m3 or int8) gets one fp32 scale
a token, max |c| / 448 or / 127. Everything is fp32 with one rounding into the cache.

Memory traffic. A token reads (R + P) inputs and P/2 cos and sin, writes (R + P) outputs (and 4
bytes of scale): one pass, where norm, rotation, quantisation and copy done apart take four.

Limits. R and P multiples of 8, R + P at most 1024. Slot -1 is skipped. A slot outside the cache is
skipped in the kernel too; `check_indices=True` reports it. Two tokens with the same slot race.
Offsets are int64. No gradient: this is the serving path.

Source. The operation is vLLM's `concat_and_cache_mla` with the norm and the rotation fused before
it.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ic.kernels.arguments import require
from ic.kernels.launch import Launch, Launches, is_eager, needs_gradient
from ic.kernels.mla_decode_checks import check_devices
from ic.kernels.mla_decode_launch import device_of


@triton.jit
def _encode(x, BITS: tl.constexpr, INT8: tl.constexpr):
    """Round scaled fp32 to e4m3 or int8; BITS does e4m3 with integers (before sm_89)."""
    if INT8:
        # Adding 1.5 * 2^23 rounds to nearest even in the last bits of an fp32.
        rounded = (x + 12582912.0) - 12582912.0
        return rounded.to(tl.int8)
    elif BITS:
        magnitude = tl.minimum(tl.abs(x), 448.0)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the step is 2^-9: adding 2^14 rounds to it; the last bits are the code.
        small = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(magnitude < 0.015625, small, normal)
        return (code | tl.where(x < 0, 0x80, 0)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def append_token(
    t, latent_ptr, rope_key_ptr, weight_ptr, cos_ptr, sin_ptr, cache_ptr, scale_ptr, slots_ptr,
    stride_latent, stride_rope, stride_cos, stride_sin, stride_page, stride_token,
    stride_scale_page, stride_scale_token, page_size, num_slots, eps,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Normalise, rotate and append token t, an int64."""
    slot = tl.load(slots_ptr + t)
    if (slot >= 0) & (slot < num_slots):
        at = (slot // page_size) * stride_page + (slot % page_size) * stride_token
        cols = tl.arange(0, BLOCK_R)
        ok = cols < R
        x = tl.load(latent_ptr + t * stride_latent + cols, mask=ok, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=ok, other=0.0).to(tl.float32)
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / R + eps)) * weight

        f = tl.arange(0, BLOCK_F)
        f_ok = f < P // 2
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        SECOND: tl.constexpr = 1 if INTERLEAVED else P // 2
        key = rope_key_ptr + t * stride_rope + f * STEP
        a = tl.load(key, mask=f_ok, other=0.0).to(tl.float32)
        b = tl.load(key + SECOND, mask=f_ok, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + t * stride_cos + f, mask=f_ok, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + t * stride_sin + f, mask=f_ok, other=0.0).to(tl.float32)
        first = a * cos - b * sin
        second = b * cos + a * sin

        if QUANTIZED:
            INT8: tl.constexpr = cache_ptr.dtype.element_ty == tl.int8
            LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
            peak = tl.maximum(
                tl.max(tl.abs(x), 0), tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)
            )
            scale = tl.maximum(peak, 1e-12) / LARGEST
            scale_at = (slot // page_size) * stride_scale_page + (
                slot % page_size
            ) * stride_scale_token
            tl.store(scale_ptr + scale_at, scale)
            tl.store(cache_ptr + at + cols, _encode(tl.div_rn(x, scale), BITS, INT8), mask=ok)
            rope_at = cache_ptr + at + R + f * STEP
            tl.store(rope_at, _encode(tl.div_rn(first, scale), BITS, INT8), mask=f_ok)
            tl.store(rope_at + SECOND, _encode(tl.div_rn(second, scale), BITS, INT8), mask=f_ok)
        else:
            tl.store(cache_ptr + at + cols, x.to(cache_ptr.dtype.element_ty), mask=ok)
            rope_at = cache_ptr + at + R + f * STEP
            tl.store(rope_at, first.to(cache_ptr.dtype.element_ty), mask=f_ok)
            tl.store(rope_at + SECOND, second.to(cache_ptr.dtype.element_ty), mask=f_ok)


@triton.jit
def _append_kernel(
    latent_ptr, rope_key_ptr, weight_ptr, cos_ptr, sin_ptr, cache_ptr, scale_ptr, slots_ptr,
    stride_latent, stride_rope, stride_cos, stride_sin, stride_page, stride_token,
    stride_scale_page, stride_scale_token, page_size, num_slots, eps,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    append_token(
        tl.program_id(0).to(tl.int64), latent_ptr, rope_key_ptr, weight_ptr, cos_ptr, sin_ptr,
        cache_ptr, scale_ptr, slots_ptr, stride_latent, stride_rope, stride_cos, stride_sin,
        stride_page, stride_token, stride_scale_page, stride_scale_token, page_size, num_slots, eps,
        R, P, BLOCK_R, BLOCK_F, INTERLEAVED, QUANTIZED, BITS,
    )  # fmt: skip


def kernel_constants(
    latent_dim: int, rope_dim: int, *, interleaved: bool, quantized: bool, bits: bool
) -> dict[str, Any]:
    return {
        "R": latent_dim,
        "P": rope_dim,
        "BLOCK_R": triton.next_power_of_2(latent_dim),
        "BLOCK_F": triton.next_power_of_2(rope_dim // 2),
        "INTERLEAVED": interleaved,
        "QUANTIZED": quantized,
        "BITS": bits,
    }


# For each kind of input: the launch and its numbers, without eps.
_launches = Launches()


def _append(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache_scale: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    tensors = latent, rope_key, weight, cos, sin, cache, cache_scale, slot_mapping
    key = (
        interleaved,
        *((x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors if x is not None),
    )
    ready = _launches.get(key)
    if ready is None:
        check_append(latent, rope_key, weight, cos, sin, cache, slot_mapping, cache_scale)
        ready = _launches[key] = _prepare(*tensors, interleaved)
    launch, numbers, codes = ready
    if codes is not None:
        tensors = *tensors[:5], cache.view(codes), *tensors[6:]
    if len(latent):
        launch((len(latent), 1, 1), tensors, (*numbers, eps))


def _prepare(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    interleaved: bool,
) -> tuple[Launch, tuple[int, ...], torch.dtype | None]:
    """The launch, its numbers without eps, and the dtype in which the kernel takes the cache, or
    None for its own.
    """
    constants, numbers, codes = append_arguments(
        latent, rope_key, cos, sin, cache, cache_scale, interleaved=interleaved
    )
    return Launch(_append_kernel, constants, num_warps=1), numbers, codes


def append_arguments(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    *,
    interleaved: bool,
) -> tuple[dict[str, Any], tuple[int, ...], torch.dtype | None]:
    """The constants of `append_token`, its numbers without eps, and the dtype in which it takes the
    cache, or None for its own.
    """
    device = device_of(cache)
    e4m3 = cache.dtype == torch.float8_e4m3fn
    bits = e4m3 and (device.capability < 89 or device.interpreted)
    numbers = (
        latent.stride(0), rope_key.stride(0), cos.stride(0), sin.stride(0), *cache.stride()[:2],
        *(cache_scale.stride() if cache_scale is not None else (0, 0)),
        cache.shape[1], cache.shape[0] * cache.shape[1],
    )  # fmt: skip
    constants = kernel_constants(
        latent.shape[1], rope_key.shape[1], interleaved=interleaved,
        quantized=cache_scale is not None, bits=bits,
    )  # fmt: skip
    return constants, numbers, torch.uint8 if bits else None


@torch.library.custom_op("ic::append_latent", mutates_args=("cache", "cache_scale"))
def _append_latent_op(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache_scale: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    _append(
        latent, rope_key, weight, cos, sin, cache, slot_mapping, cache_scale, eps, interleaved
    )  # fmt: skip


@_append_latent_op.register_fake
def _(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache_scale: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    return None


def append_latent(
    latent_TR: torch.Tensor,
    rope_key_TP: torch.Tensor,
    weight_R: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    cache_scale: torch.Tensor | None = None,
    check_indices: bool = True,
) -> None:
    """Normalise, rotate and append T tokens to the paged latent cache, in place.

    Args:
        latent_TR, rope_key_TP: the two parts of `kv_a_proj_with_mqa`'s output, or slices of it.
        weight_R: `kv_a_layernorm`'s weight.
        cos_TF, sin_TF: (T, P/2) of each token's position, fp32 or the latent's dtype.
        cache: (num_pages, page_size, R + P); bf16, fp16, fp32, or float8_e4m3fn or int8 with
            `cache_scale`.
        slot_mapping_T: int64 (T,), slot of each token, -1 to skip it.
        cache_scale: fp32 (num_pages, page_size), written for quantised caches.
        check_indices: compare the slots with the cache first, which waits for the device. Off,
            a slot outside the cache is skipped.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    arguments = (
        latent_TR, rope_key_TP, weight_R, cos_TF, sin_TF, cache, slot_mapping_T, cache_scale,
        float(eps), interleaved,
    )  # fmt: skip
    if check_indices:
        check_append(*arguments[:8])
        _check_slots(cache, slot_mapping_T)
    if not is_eager(*arguments[:8]) or needs_gradient(*arguments[:5]):
        _append_latent_op(*arguments)
        return
    _append(*arguments)
    if not cache.is_inference():
        torch.autograd.graph.increment_version(cache)


def _check_slots(cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    if slot_mapping.numel():
        low, high = int(slot_mapping.min()), int(slot_mapping.max())
        slots = cache.shape[0] * cache.shape[1]
        require(low >= -1, f"slot_mapping holds {low}; allowed are slots and -1")
        require(high < slots, f"slot_mapping holds {high}; the cache has {slots} slots")


def check_append(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache_scale: torch.Tensor | None,
) -> None:
    require(latent.dim() == 2, f"latent has shape {tuple(latent.shape)}; want (T, R)")
    T, R = latent.shape
    require(
        rope_key.dim() == 2 and rope_key.shape[0] == T,
        f"rope_key has shape {tuple(rope_key.shape)}; want ({T}, P)",
    )
    P = rope_key.shape[1]
    require(
        R >= 8 and P >= 8 and R % 8 == 0 and P % 8 == 0 and R + P <= 1024,
        f"latent and rope_key have dimensions {R} and {P}; multiples of 8, together at most 1024",
    )
    floats = (torch.bfloat16, torch.float16, torch.float32)
    require(latent.dtype in floats, f"latent is {latent.dtype}; allowed are {floats}")
    require(rope_key.dtype == latent.dtype, f"rope_key is {rope_key.dtype}; latent {latent.dtype}")
    require(
        weight.shape == (R,) and weight.dtype in floats and weight.is_contiguous(),
        f"weight is {weight.dtype} {tuple(weight.shape)}; want a contiguous float ({R},)",
    )
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            table.shape == (T, P // 2) and table.dtype in floats,
            f"{name} is {table.dtype} {tuple(table.shape)}; want a float ({T}, {P // 2})",
        )
    require(
        cache.dim() == 3 and cache.shape[2] == R + P and cache.shape[1] % 16 == 0,
        f"cache has shape {tuple(cache.shape)}; want (num_pages, multiple of 16, {R + P})",
    )
    if cache_scale is None:
        require(cache.dtype in floats, f"cache is {cache.dtype}; a quantised one needs cache_scale")
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
    require(
        slot_mapping.dtype == torch.int64
        and slot_mapping.shape == (T,)
        and slot_mapping.is_contiguous(),
        f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}; "
        f"want contiguous int64 ({T},)",
    )
    named = {
        "latent": latent, "rope_key": rope_key, "weight": weight, "cos": cos, "sin": sin,
        "cache": cache, "slot_mapping": slot_mapping, "cache_scale": cache_scale,
    }  # fmt: skip
    check_devices(named)
    for name in ("latent", "rope_key", "cos", "sin", "cache"):
        tensor = named[name]
        assert tensor is not None
        require(
            tensor.stride(-1) == 1,
            f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1",
        )
