"""RMSNorm, forward and backward, alone and with the residual addition: 16384 tokens, bf16."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from ic.kernels.benchmark_registry import BenchmarkCase, Call, Inputs, register
from ic.kernels.reference import rms_norm_reference
from ic.kernels.triton_rmsnorm import add_rms_norm, rms_norm, rms_norm_backward_op, rms_norm_op

TOKENS, EPS = 16384, 1e-6


def _make_inputs(dim: int, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    names = ("x", "residual", "dy")
    shape = (TOKENS, dim)
    inputs: Inputs = {
        n: torch.randn(shape, generator=generator, device=device).bfloat16() for n in names
    }
    inputs["weight"] = (1 + torch.randn(dim, generator=generator, device=device) / 4).bfloat16()
    inputs["inverse"] = rms_norm_op(inputs["x"], inputs["weight"], EPS)[1]
    return inputs


def _forward(inputs: Inputs) -> Call:
    return lambda: rms_norm(inputs["x"], inputs["weight"], EPS)


def _forward_residual(inputs: Inputs) -> Call:
    return lambda: add_rms_norm(inputs["x"], inputs["residual"], inputs["weight"], EPS)


def _backward(inputs: Inputs) -> Call:
    dy, x, weight, inverse = (inputs[name] for name in ("dy", "x", "weight", "inverse"))
    return lambda: rms_norm_backward_op(dy, None, x, weight, inverse)


def _backward_residual(inputs: Inputs) -> Call:
    dy, above, x, weight, inverse = (
        inputs[n] for n in ("dy", "residual", "x", "weight", "inverse")
    )
    return lambda: rms_norm_backward_op(dy, above, x, weight, inverse)


def _reference(part: str, inputs: Inputs) -> torch.Tensor:
    residual = inputs["residual"] if part == "forward + residual" else None
    if part.startswith("forward"):
        return rms_norm_reference(inputs["x"], inputs["weight"], EPS, residual)[0]
    x = inputs["x"].float().requires_grad_()
    y, _ = rms_norm_reference(x, inputs["weight"].float(), EPS)
    dx = torch.autograd.grad(y, x, inputs["dy"].float())[0]
    return dx + inputs["residual"].float() if part == "backward + residual" else dx


def _liger(backward: bool, inputs: Inputs) -> Call:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    if not backward:
        return lambda: forward(inputs["x"], inputs["weight"])
    x, weight = (inputs[name].clone().requires_grad_() for name in ("x", "weight"))
    y = forward(x, weight)
    return lambda: torch.autograd.grad(y, (x, weight), inputs["dy"], retain_graph=True)


def _compiled(backward: bool, inputs: Inputs) -> Call:
    # Without dynamic=False the second width is compiled for any width, which is another kernel.
    norm = torch.compile(
        lambda x, w: torch.nn.functional.rms_norm(x, (x.shape[-1],), w, EPS), dynamic=False
    )
    if not backward:
        return lambda: norm(inputs["x"], inputs["weight"])
    from torch._functorch import config as functorch_config

    functorch_config.donated_buffer = False  # or the second backward pass of one graph is refused
    x, weight = (inputs[name].clone().requires_grad_() for name in ("x", "weight"))
    y = norm(x, weight)
    return lambda: torch.autograd.grad(y, (x, weight), inputs["dy"], retain_graph=True)


@register("rmsnorm")
def cases() -> Iterable[BenchmarkCase]:
    for dim in (2048, 7168):
        for part, ours, matrices in (
            ("forward", _forward, 2),
            ("backward", _backward, 3),
            ("forward + residual", _forward_residual, 4),
            ("backward + residual", _backward_residual, 4),
        ):
            backward = part.startswith("backward")
            yield BenchmarkCase(
                kernel="rmsnorm",
                name=f"{part} {TOKENS} x {dim}",
                config={"tokens": TOKENS, "dim": dim, "part": part},
                make_inputs=partial(_make_inputs, dim),
                ours=ours,
                reference=partial(_reference, part),
                peers={}
                if "residual" in part
                else {
                    "liger": partial(_liger, backward),
                    "torch.compile": partial(_compiled, backward),
                },
                bytes_moved=matrices * TOKENS * dim * 2,
                flops=0,
                tolerance=5e-3,
            )
