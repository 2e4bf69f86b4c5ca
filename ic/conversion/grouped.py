"""The weights of grouped-query attention by head, in float64, biases as a last column.

Legend: H query heads, G KV heads, s = H / G query heads of a KV head, d head_dim, D hidden,
X = D + 1: the input with a 1 behind it, whose column is the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ic.conversion.families import Geometry


@dataclass(frozen=True)
class GroupedWeights:
    """Attention of one layer.

    Attributes:
        q_GsdX, k_GdX, v_GdX: projections by head.
        o_DGsd: the output's, without its bias.
        o_bias_D: the output's bias, zero where it has none.
        q_norm_d, k_norm_d: weights of the norms of query and key, or None.
    """

    q_GsdX: Tensor
    k_GdX: Tensor
    v_GdX: Tensor
    o_DGsd: Tensor
    o_bias_D: Tensor
    q_norm_d: Tensor | None
    k_norm_d: Tensor | None


def grouped_weights(attention: Any, geometry: Geometry) -> GroupedWeights:
    """The weights of an attention module of `transformers`, on its device."""
    groups, dim = geometry.kv_heads, geometry.head_dim
    output = attention.o_proj
    bias = output.weight.new_zeros(geometry.hidden_size) if output.bias is None else output.bias
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if norm is None else norm.weight.double() for norm in norms)
    return GroupedWeights(
        q_GsdX=_with_bias(attention.q_proj).unflatten(0, (groups, -1, dim)),
        k_GdX=_with_bias(attention.k_proj).unflatten(0, (groups, dim)),
        v_GdX=_with_bias(attention.v_proj).unflatten(0, (groups, dim)),
        o_DGsd=output.weight.double().unflatten(1, (groups, -1, dim)),
        o_bias_D=bias.double(),
        q_norm_d=q_norm,
        k_norm_d=k_norm,
    )


def _with_bias(layer: Any) -> Tensor:
    weight = layer.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.double()
    return torch.cat((weight, bias[:, None]), dim=1)
