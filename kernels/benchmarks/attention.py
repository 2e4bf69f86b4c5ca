"""Causal attention for training, 16 heads of 192/128, bf16: batch 1 x 32k and 4 x 4k.

FLOP counted for a visible pair (query, key) and head: forward 2 * (192 + 128); backward 2 * (3 *
192 + 2 * 128), each of its five matrix products once, although ours computes two of them twice. Of
the gradients the case "backward" compares dq and "both" dk; the tests compare all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, Prepare, register
from ic.kernels.triton_mla_attention import mla_attention_backward_op, mla_attention_op

HEADS, D, V = 16, 192, 128
SCALE = D**-0.5


def _make_inputs(batch: int, tokens: int, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(width: int) -> Tensor:
        shape = (batch, tokens, HEADS, width)
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    inputs = {"q": randn(D), "k": randn(D), "v": randn(V), "dout": randn(V)}
    inputs["out"], inputs["lse"] = mla_attention_op(
        inputs["q"], inputs["k"], inputs["v"], SCALE, None
    )
    return inputs


def _reference(name: str, inputs: Inputs) -> Tensor:
    """fp32, head by head and 1024 queries at a time, so that 32k tokens fit."""
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    result = {
        name: torch.zeros(x.shape, device=x.device)
        for name, x in zip("oqk", (v, q, k), strict=True)
    }
    tokens = q.shape[1]
    for b in range(q.shape[0]):
        for h in range(HEADS):
            kh, vh = k[b, :, h].float(), v[b, :, h].float()
            for begin in range(0, tokens, 1024):
                end = min(begin + 1024, tokens)
                qh, gh = q[b, begin:end, h].float(), dout[b, begin:end, h].float()
                hidden = torch.ones(end - begin, end, dtype=torch.bool, device=q.device).triu(
                    begin + 1
                )
                p = (SCALE * qh @ kh[:end].T).masked_fill(hidden, float("-inf")).softmax(-1)
                out = p @ vh[:end]
                ds = SCALE * p * (gh @ vh[:end].T - (gh * out).sum(-1, keepdim=True))
                result["o"][b, begin:end, h] = out
                result["q"][b, begin:end, h] = ds @ kh[:end]
                result["k"][b, :end, h] += ds.T @ qh
    return result[name]


def _forward(inputs: Inputs) -> Call:
    return lambda: mla_attention_op(inputs["q"], inputs["k"], inputs["v"], SCALE, None)


def _backward(inputs: Inputs) -> Call:
    q, k, v, dout, out, lse = (inputs[name] for name in ("q", "k", "v", "dout", "out", "lse"))
    return lambda: mla_attention_backward_op(dout, q, k, v, out, lse, SCALE, None)


def _both(inputs: Inputs) -> Call:
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))

    def call() -> tuple[Tensor, Tensor]:
        out, lse = mla_attention_op(q, k, v, SCALE, None)
        dq, dk, _ = mla_attention_backward_op(dout, q, k, v, out, lse, SCALE, None)
        return dk, dq

    return call


def _autograd_peer(part: str, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepare:
    """A peer that takes (B, H, T, .), differentiable by autograd."""

    def prepare(inputs: Inputs) -> Call:
        leaves = [inputs[name].transpose(1, 2).contiguous().requires_grad_() for name in "qkv"]
        dout = inputs["dout"].transpose(1, 2).contiguous()
        if part == "forward":
            detached = [x.detach() for x in leaves]
            return lambda: attention(*detached).transpose(1, 2)
        if part == "backward":
            out = attention(*leaves)
            return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)[0].transpose(
                1, 2
            )
        return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)[1].transpose(1, 2)

    return prepare


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=SCALE
        )


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = _compile_once(flex_attention)
    return compiled(q, k, v, block_mask=_causal_blocks(q.shape[2], q.device), scale=SCALE)


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


@cache
def _causal_blocks(tokens: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, tokens, tokens, device=device)


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`flash-attn-4`, which takes (B, T, H, .): the transposes are views."""
    interface = importlib.import_module("flash_attn.cute")

    out = interface.flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=SCALE, causal=True
    )
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@register("attention")
def cases() -> Iterable[BenchmarkCase]:
    for batch, tokens in ((1, 32768), (4, 4096)):
        pairs = batch * HEADS * tokens * (tokens + 1) // 2
        per_token = 2 * batch * tokens * HEADS  # bytes of one bf16 column over all tokens and heads
        config: dict[str, Any] = {
            "batch": batch,
            "tokens": tokens,
            "heads": HEADS,
            "d_qk": D,
            "d_v": V,
        }

        for part, ours, result, num_flops, columns in (
            ("forward", _forward, "o", 2 * (D + V), 2 * D + 2 * V),
            ("backward", _backward, "q", 2 * (3 * D + 2 * V), 4 * D + 4 * V),
            ("both", _both, "k", 2 * (4 * D + 3 * V), 6 * D + 6 * V),
        ):
            yield BenchmarkCase(
                kernel="attention",
                name=f"{part} {batch} x {tokens // 1024}k",
                config=config | {"part": part},
                make_inputs=partial(_make_inputs, batch, tokens),
                ours=ours,
                reference=partial(_reference, result),
                peers={
                    "cudnn": _autograd_peer(part, _cudnn),
                    "FlexAttention": _autograd_peer(part, _flex),
                    "FlashAttention-4": _autograd_peer(part, _flash_attention_4),
                },
                bytes_moved=per_token * columns,
                flops=pairs * num_flops,
                tolerance=5e-3,
            )
