"""Rounding that makes up for its errors: each column of a weight is rounded in turn, and what that
changes of the layer's output is taken back by the columns behind it (GPTQ, arXiv 2210.17323).

Legend: M rows, T tokens, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 128  # columns whose errors reach the others at once
# Added to the diagonal, as a share of its mean: inputs that hardly vary say little.
_DAMPING = 0.01
_LOWEST, _HIGHEST = -8, 7


@torch.no_grad()
def input_moments(
    model: nn.Module,
    rows_MT: Tensor,
    layers: Collection[str],
    on_row: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """E[x x^T] (K, K) float32 of the inputs x of each layer, over all tokens of the rows.

    Args:
        layers: names of linear layers of the model.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_TK = inputs[0].flatten(0, -2).float()
        if name not in sums:
            sums[name] = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1])
        sums[name].addmm_(x_TK.T, x_TK)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in layers
    ]
    try:
        device = next(model.parameters()).device
        for row_T in rows_MT:
            model(row_T[None].to(device), use_cache=False, logits_to_keep=1)
            on_row(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows_MT.numel() for name, total in sums.items()}


@torch.no_grad()
def compensated(weight_NK: Tensor, moment_KK: Tensor, scale_NG: Tensor, group_size: int) -> Tensor:
    """The weight (N, K) float32 on the grid of its scales, int4 codes times scale, by GPTQ.

    Args:
        moment_KK: of the layer's inputs, on the device that computes.
    """
    device = moment_KK.device
    rest_NK = weight_NK.to(device, torch.float32, copy=True)
    scale_NG = scale_NG.to(device).float()
    factor_KK = _factor(moment_KK)
    found_NK = torch.empty_like(rest_NK)
    inputs = rest_NK.shape[1]
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        errors_NX = torch.empty_like(rest_NK[:, begin:end])
        for i in range(begin, end):
            scale_N = scale_NG[:, i // group_size]
            code_N = (rest_NK[:, i] / scale_N).round().clamp(_LOWEST, _HIGHEST)
            found_NK[:, i] = code_N * scale_N
            error_N = (rest_NK[:, i] - found_NK[:, i]) / factor_KK[i, i]
            rest_NK[:, i + 1 : end] -= error_N[:, None] * factor_KK[i, i + 1 : end]
            errors_NX[:, i - begin] = error_N
        rest_NK[:, end:] -= errors_NX @ factor_KK[begin:end, end:]
    return found_NK.cpu()


def _factor(moment_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moment, float32."""
    wide_KK = moment_KK.double()
    diagonal_K = wide_KK.diagonal()
    damped_KK = wide_KK + torch.diag(
        (_DAMPING * diagonal_K.mean()).clamp_min(1e-12).expand_as(diagonal_K)
    )
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    return torch.linalg.cholesky(inverse_KK, upper=True).float()
