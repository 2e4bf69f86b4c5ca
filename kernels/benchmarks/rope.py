"""Decoupled RoPE of 16384 tokens, 16 + 1 and 128 + 1 heads of 64, bf16, both layouts.

"backward" is the inverse rotation of the gradients. The error is that of q.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, register
from ic.kernels.reference import rope_reference
from ic.kernels.triton_rope import apply_rope, rope_op

TOKENS, WIDTH = 16384, 64


def _make_inputs(heads: int, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    angle = 3 * torch.randn(1, TOKENS, WIDTH // 2, generator=generator, device=device)
    q, k = (
        torch.randn(1, TOKENS, n, WIDTH, generator=generator, device=device).bfloat16()
        for n in (heads, 1)
    )
    return {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin()}


def _ours(inputs: Inputs, interleaved: bool, inverse: bool) -> Call:
    q, k, cos, sin = (inputs[name] for name in ("q", "k", "cos", "sin"))
    if inverse:
        return lambda: rope_op(q, k, cos, sin, interleaved, inverse)
    return lambda: apply_rope(q, k, cos, sin, interleaved)


def _reference(inputs: Inputs, interleaved: bool, inverse: bool) -> torch.Tensor:
    sin = -inputs["sin"] if inverse else inputs["sin"]
    return rope_reference(inputs["q"], inputs["cos"], sin, interleaved=interleaved)


def _compiled(inputs: Inputs, interleaved: bool, inverse: bool) -> Call:
    q, k, cos, sin = (inputs[name] for name in ("q", "k", "cos", "sin"))

    @torch.compile(dynamic=False)
    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        sin = -sin if inverse else sin
        return tuple(rope_reference(x, cos, sin, interleaved=interleaved) for x in (q, k))

    return lambda: rotate(q, k, cos, sin)


@register("rope")
def cases() -> Iterable[BenchmarkCase]:
    for heads in (16, 128):
        for interleaved in (True, False):
            for inverse in (False, True):
                layout = "interleaved" if interleaved else "half-split"
                part = "backward" if inverse else "forward"
                options: dict[str, Any] = {"interleaved": interleaved, "inverse": inverse}
                yield BenchmarkCase(
                    kernel="rope",
                    name=f"{part} {heads} + 1 heads, {layout}",
                    config={
                        "tokens": TOKENS,
                        "heads": heads,
                        "width": WIDTH,
                        "layout": layout,
                        "part": part,
                    },
                    make_inputs=partial(_make_inputs, heads),
                    ours=partial(_ours, **options),
                    reference=partial(_reference, **options),
                    peers={"torch.compile": partial(_compiled, **options)},
                    bytes_moved=2 * 2 * TOKENS * (heads + 1) * WIDTH + 2 * 4 * TOKENS * WIDTH // 2,
                    flops=0,
                    tolerance=5e-3,
                )
