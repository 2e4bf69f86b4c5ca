"""Numbers of a cached row that are of like size, so that the one scale of a row serves them all.

A row of an int8 cache is rounded in steps of 1/127 of its largest number. A rotary key that is a
hundred times as large as the latent beside it, as converted models have it, leaves the latent two
or three codes. What is taken from a number there can be given to what it is multiplied by: a
rotary pair of the key to the same pair of the queries, a dimension of the latent to the inputs of
`kv_b_proj`. The factors are powers of two, so that the model computes what it did, bit for bit,
in float32 and bfloat16. float16 has too little range for that.

The exchange is that of SmoothQuant (arXiv 2211.10438), between the two sides of a product that is
never computed apart.

Legend: M rows, T tokens, H heads, R kv_lora_rank, N qk_nope_head_dim, P qk_rope_head_dim,
C = R + P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ic.checkpoint.weights import Weights
from ic.errors import UsageError
from ic.model import MLAConfig
from ic.model.attention import MLAAttention

# Of a number that calibration hardly saw nothing is known: it is not raised further than this.
_MOST = 2.0**8


@dataclass(frozen=True)
class RowFactors:
    """What the numbers of a layer's rows are divided by, powers of two.

    Attributes:
        latent_R: of the latent.
        rotary_P: of the rotary key; the two numbers of a pair have the same.
    """

    latent_R: Tensor
    rotary_P: Tensor


@torch.no_grad()
def row_factors(
    model: torch.nn.Module, rows_MT: Tensor, on_row: Callable[[int], None] = lambda _: None
) -> dict[str, RowFactors]:
    """The factors of each attention layer, by its name in the model, after reading a text.

    Args:
        rows_MT: token ids.
        on_row: told of each row that was read.

    Raises:
        UsageError: rows that are not finite.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, layer: MLAAttention, module: Any, inputs: Any, out_BTC: Tensor) -> None:
        config = layer.config
        latent_BTR, rotary_BTP = out_BTC.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        row_C = torch.cat([layer.kv_a_layernorm(latent_BTR), rotary_BTP], -1).float().square()
        row_C = row_C.flatten(0, -2).mean(0)
        squares[name] = squares[name] + row_C if name in squares else row_C

    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, MLAAttention)}
    hooks = [
        layer.kv_a_proj_with_mqa.register_forward_hook(partial(add, name, layer))
        for name, layer in layers.items()
    ]
    try:
        device = next(model.parameters()).device
        for row_T in rows_MT:
            model(row_T[None].to(device), use_cache=False, logits_to_keep=1)
            on_row(1)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in squares.items():
        if not total.isfinite().all():
            raise UsageError(
                f"{name} computes numbers that are NaN or infinite: the source is damaged"
            )
    return {
        name: _factors((total / len(rows_MT)).cpu(), layers[name].config)
        for name, total in squares.items()
    }


def check_balance(config: MLAConfig, weights: Weights) -> None:
    """Refuse a model whose numbers cannot change their size.

    Raises:
        UsageError: float16 weights, or norms that give keys their size.
    """
    if any(tensor.dtype == torch.float16 for tensor in weights.sizes.values()):
        raise UsageError(
            "cache=int8 calibration: float16 has too little range to bring numbers to like size; "
            "`export dtype=bfloat16` first, or leave calibration out"
        )
    if config.qk_norm_dim is not None:
        raise UsageError(
            "cache=int8 calibration: this model's norms of queries and keys (qk_norm_dim) give its "
            "rotary keys their size already; leave calibration out"
        )


class BalancedWeights:
    """`ic.checkpoint.weights.Weights` with the factors in the weights that make and read a row.

    Args:
        weights: the source's.
        factors: of its attention layers, by their names.

    Attributes:
        sizes: the source's.
    """

    def __init__(
        self, weights: Weights, factors: Mapping[str, RowFactors], config: MLAConfig
    ) -> None:
        self._weights, self._factors, self._config = weights, factors, config
        self.sizes: Mapping[str, Tensor] = weights.sizes

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        layer, _, kind = name.rpartition(".")
        attention, _, part = layer.rpartition(".")
        factors = self._factors.get(attention)
        return tensor if factors is None else self._changed(tensor, part, kind, factors)

    def _changed(self, tensor: Tensor, part: str, kind: str, factors: RowFactors) -> Tensor:
        latent_R, rotary_P = (f.to(tensor.dtype) for f in (factors.latent_R, factors.rotary_P))
        if part in ("q_proj", "q_b_proj"):
            rest_N = rotary_P.new_ones(self._config.qk_nope_head_dim)
            of_a_head = torch.cat([rest_N, rotary_P])
            return _outputs_times(tensor, of_a_head.repeat(self._config.num_attention_heads))
        if part == "kv_a_proj_with_mqa":
            normed = torch.ones_like(latent_R) if self._config.latent_norm else 1 / latent_R
            return _outputs_times(tensor, torch.cat([normed, 1 / rotary_P]))
        if part == "kv_a_layernorm":
            return tensor / latent_R
        if part == "kv_b_proj" and kind == "weight":
            return tensor * latent_R
        return tensor


def _outputs_times(tensor: Tensor, factor_N: Tensor) -> Tensor:
    """A weight (N, K) or a bias (N,) with its outputs multiplied."""
    return tensor * factor_N.view(-1, *[1] * (tensor.dim() - 1))


def _factors(square_C: Tensor, config: MLAConfig) -> RowFactors:
    latent_R, rotary_P = square_C.split([config.kv_lora_rank, config.qk_rope_head_dim])
    # Side by side, or a piece of each half: one factor a pair, as the rotation mixes the two.
    if config.rope_interleave:
        alike_P = rotary_P.view(-1, 2).mean(1).repeat_interleave(2)
    else:
        alike_P = rotary_P.view(2, -1).mean(0).repeat(2)
    return RowFactors(_power_of_two(latent_R), _power_of_two(alike_P))


def _power_of_two(square: Tensor) -> Tensor:
    """The power of two next to the root, in ratios; one where all are zero."""
    root = square.sqrt()
    most = float(root.max())
    return torch.exp2(root.clamp_min(most / _MOST).log2().round()) if most else root + 1
