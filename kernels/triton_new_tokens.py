"""One kernel between projections and decode: queries scaled and rotated in place, and the append.

What. For each new token `triton_append_latent` normalises its latent, rotates its shared key and
appends both. Beside it, for every head h of the token, with n the keys that it sees,

    q = [ f q_nope | rotate(f q_rope) ]    f = 1,  or scale_h log(n),
                                           or 1 + beta log(1 + floor((n - 1) / original))

(no length temperature, ssmax, llama4). f q is rounded to the dtype of q before it is rotated, as
where the steps are kernels of their own.

Tiling: of the programs of a token, the first appends and each other one takes BLOCK_H heads.

Memory traffic: that of the append, and the queries read and written once.

Limits: those of the append; P as there; heads lie at a constant distance, each with its rope part
last. No gradient: this is the serving path.

Source: RoPE and append as in `triton_rope` and `triton_append_latent`; ssmax is arXiv 2501.19399.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ic.kernels.arguments import FLOATS, check_tensor
from ic.kernels.launch import Launch, Launches, is_eager, needs_gradient
from ic.kernels.triton_append_latent import append_arguments, append_token, check_append

TEMPERATURES = ("none", "ssmax", "llama4")
BLOCK_H = 4


@triton.jit
def _new_tokens_kernel(
    q_ptr, temperature_ptr, visible_ptr, latent_ptr, rope_key_ptr, weight_ptr, cos_ptr, sin_ptr,
    cache_ptr, scale_ptr, slots_ptr, stride_q, stride_head, stride_visible, num_heads, beta,
    original, stride_latent, stride_rope, stride_cos, stride_sin, stride_page, stride_token,
    stride_scale_page, stride_scale_token, page_size, num_slots, eps,
    TEMPERATURE: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        append_token(
            t, latent_ptr, rope_key_ptr, weight_ptr, cos_ptr, sin_ptr, cache_ptr, scale_ptr,
            slots_ptr, stride_latent, stride_rope, stride_cos, stride_sin, stride_page,
            stride_token, stride_scale_page, stride_scale_token, page_size, num_slots, eps,
            R, P, BLOCK_R, BLOCK_F, INTERLEAVED, QUANTIZED, BITS,
        )  # fmt: skip
    else:
        heads = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        head_ok = (heads < num_heads)[:, None]
        dtype = q_ptr.dtype.element_ty
        factor = tl.full([HEADS], 1.0, tl.float32)
        if TEMPERATURE == "ssmax":
            n = tl.load(visible_ptr + t * stride_visible).to(tl.float32)
            scale = tl.load(temperature_ptr + heads, mask=heads < num_heads, other=0.0)
            factor = scale.to(tl.float32) * tl.log(n)
        elif TEMPERATURE == "llama4":
            n = tl.load(visible_ptr + t * stride_visible)
            factor += beta * tl.log(1.0 + tl.floor((n - 1).to(tl.float32) / original))
        factor = factor[:, None]
        row = q_ptr + t * stride_q + heads.to(tl.int64)[:, None] * stride_head
        if TEMPERATURE != "none" and N > 0:
            cols = tl.arange(0, BLOCK_N)[None, :]
            ok = head_ok & (cols < N)
            x = tl.load(row + cols, mask=ok, other=0.0).to(tl.float32)
            tl.store(row + cols, (x * factor).to(dtype), mask=ok)
        f = tl.arange(0, BLOCK_F)
        ok = head_ok & (f < P // 2)[None, :]
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        SECOND: tl.constexpr = 1 if INTERLEAVED else P // 2
        at = row + N + (f * STEP)[None, :]
        a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(at + SECOND, mask=ok, other=0.0).to(tl.float32)
        if TEMPERATURE != "none":
            a = (a * factor).to(dtype).to(tl.float32)
            b = (b * factor).to(dtype).to(tl.float32)
        cos = tl.load(cos_ptr + t * stride_cos + f, mask=f < P // 2, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + t * stride_sin + f, mask=f < P // 2, other=0.0).to(tl.float32)
        first = a * cos[None, :] - b * sin[None, :]
        second = a * sin[None, :] + b * cos[None, :]
        tl.store(at, first.to(dtype), mask=ok)
        tl.store(at + SECOND, second.to(dtype), mask=ok)


# For each kind of input: the launch, its numbers before and after beta and original, and the
# dtype in which the kernel takes the cache.
_launches = Launches()


def _run(
    query: Tensor,
    temperature: str,
    temperature_scale: Tensor | None,
    visible: Tensor | None,
    beta: float,
    original: float,
    latent: Tensor,
    rope_key: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    cache_scale: Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    tensors = (
        query, temperature_scale, visible, latent, rope_key, weight, cos, sin, cache, cache_scale,
        slot_mapping,
    )  # fmt: skip
    key = (
        interleaved,
        temperature,
        *(None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors),
    )
    ready = _launches.get(key)
    if ready is None:
        check_append(latent, rope_key, weight, cos, sin, cache, slot_mapping, cache_scale)
        _check(query, temperature, temperature_scale, visible, latent, rope_key)
        constants, numbers, codes = append_arguments(
            latent, rope_key, cos, sin, cache, cache_scale, interleaved=interleaved
        )
        nope = query.shape[2] - rope_key.shape[1]
        constants |= {
            "TEMPERATURE": temperature,
            "N": nope,
            "HEADS": BLOCK_H,
            "BLOCK_N": triton.next_power_of_2(max(nope, 1)),
        }
        stride_visible = 0 if visible is None else visible.stride(0)
        first = *query.stride()[:2], stride_visible, query.shape[1]
        ready = Launch(_new_tokens_kernel, constants, num_warps=1), first, numbers, codes
        _launches[key] = ready
    launch, first, numbers, codes = ready
    if codes is not None:
        tensors = *tensors[:8], cache.view(codes), *tensors[9:]
    if len(query):
        grid = len(query), 1 + -(-query.shape[1] // BLOCK_H), 1
        launch(grid, tensors, (*first, beta, original, *numbers, eps))


def _check(
    query: Tensor,
    temperature: str,
    temperature_scale: Tensor | None,
    visible: Tensor | None,
    latent: Tensor,
    rope_key: Tensor,
) -> None:
    tokens, width = rope_key.shape
    check_tensor("query", query, shape=(tokens, None, None), dtypes=(latent.dtype,), like=latent)
    if query.shape[2] < width:
        raise ValueError(f"query: {query.shape[2]} numbers a head, the rope part alone has {width}")
    if temperature not in TEMPERATURES:
        raise ValueError(f"temperature: {temperature!r} given, one of {TEMPERATURES} expected")
    if temperature != "none":
        if visible is None:
            raise ValueError(f"visible: None given, temperature={temperature!r} needs it")
        integers = (torch.int32, torch.int64)
        check_tensor(
            "visible", visible, shape=(tokens,), dtypes=integers, like=latent, last_stride_one=False
        )
    if temperature == "ssmax":
        if temperature_scale is None:
            raise ValueError("temperature_scale: None given, temperature='ssmax' needs it")
        check_tensor(
            "temperature_scale", temperature_scale, shape=(query.shape[1],), dtypes=FLOATS,
            like=latent,
        )  # fmt: skip


@torch.library.custom_op("ic::append_with_queries", mutates_args=("query", "cache", "cache_scale"))
def append_with_queries_op(
    query: Tensor,
    temperature: str,
    temperature_scale: Tensor | None,
    visible: Tensor | None,
    beta: float,
    original: float,
    latent: Tensor,
    rope_key: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    cache_scale: Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    """As `append_with_queries`."""
    _run(
        query, temperature, temperature_scale, visible, beta, original, latent, rope_key, weight,
        cos, sin, cache, slot_mapping, cache_scale, eps, interleaved,
    )  # fmt: skip


@append_with_queries_op.register_fake
def _(query: Tensor, *others: Any) -> None:
    return None


def append_with_queries(
    query_MHK: Tensor,
    latent_MR: Tensor,
    rope_key_MP: Tensor,
    weight_R: Tensor,
    cos_MF: Tensor,
    sin_MF: Tensor,
    cache: Tensor,
    slot_mapping_M: Tensor,
    *,
    temperature: str = "none",
    temperature_scale_H: Tensor | None = None,
    visible_M: Tensor | None = None,
    beta: float = 0.0,
    original: float = 1.0,
    eps: float = 1e-6,
    interleaved: bool = True,
    cache_scale: Tensor | None = None,
) -> None:
    """`append_latent` of M tokens, and their queries scaled and rotated in place.

    Slots are not compared with the cache; those outside are skipped.

    Args:
        query_MHK: (M, H, K), each head's rope part its last P numbers.
        temperature: `none`, `ssmax` or `llama4`; of the latter two `visible_M`, int, holds the keys
            that each token sees.
        temperature_scale_H: of `ssmax`.
        beta, original: of `llama4`.
        others: as `append_latent`.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    arguments = (
        query_MHK, temperature, temperature_scale_H, visible_M, float(beta), float(original),
        latent_MR, rope_key_MP, weight_R, cos_MF, sin_MF, cache, slot_mapping_M, cache_scale,
        float(eps), interleaved,
    )  # fmt: skip
    tensors = (
        query_MHK, temperature_scale_H, visible_M, latent_MR, rope_key_MP, weight_R, cos_MF,
        sin_MF, cache, slot_mapping_M, cache_scale,
    )  # fmt: skip
    if not is_eager(*tensors) or needs_gradient(*tensors):
        append_with_queries_op(*arguments)
        return
    _run(*arguments)
    for x in (query_MHK, cache):
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
