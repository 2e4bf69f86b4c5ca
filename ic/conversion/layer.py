"""The attention of one layer as MLA's tensors: exact, or with a latent of smaller rank.

Legend: H query heads, G KV heads, s = H / G, d head_dim, F = d / 2, P rotary dimensions, R rank, D
hidden, X = D + 1: the input with a 1 behind it, whose column is the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ic.conversion.distance import Turns
from ic.conversion.folding import fold_rotary_key
from ic.conversion.grouped import GroupedWeights
from ic.conversion.latent import Latent, Weighting, compress, steadied, weighted_energy
from ic.conversion.layout import Layout
from ic.conversion.rotary import share_rotary_key, to_complex, to_halves, to_pairs


@dataclass(frozen=True)
class ConvertedLayer:
    """Attention of one layer.

    Attributes:
        tensors: float64, by their names in `MLAAttention`.
        kept: share of the weighted moment of keys and values that the latent holds, 0 to 1.
    """

    tensors: dict[str, Tensor]
    kept: float


def convert_layer(
    weights: GroupedWeights,
    second_XX: Tensor | None,
    layout: Layout,
    turns: Turns | None = None,
    still_kept: float = 1.0,
) -> ConvertedLayer:
    """MLA's tensors of a layer.

    Args:
        second_XX: second moment of the layer's input (`Moments.second`); None in the exact form.
        turns: of the keys that lose their rotation or get another; None is no turn, which a narrow
            rotary key does not take.
        still_kept: as in `fold_rotary_key`; of a narrow rotary key alone.
    """
    if layout.keeps_keys:
        return _with_whole_keys(weights, second_XX, layout)
    assert second_XX is not None
    return _with_shared_key(weights, second_XX, layout, turns, still_kept)


def _with_whole_keys(
    weights: GroupedWeights, second_XX: Tensor | None, layout: Layout
) -> ConvertedLayer:
    """The rotary key is every head's key, and a query is zero but for the block of its own."""
    groups, per_group = weights.q_GsdX.shape[:2]
    query_GsdX = to_pairs(to_complex(weights.q_GsdX))
    blocks_GsGdX = query_GsdX.new_zeros(groups, per_group, groups, *query_GsdX.shape[2:])
    for group in range(groups):
        blocks_GsGdX[group, :, group] = query_GsdX[group]
    scale = layout.query_scale
    norms = {}
    if weights.q_norm_d is not None and weights.k_norm_d is not None:
        # The norm takes a scale of the query away; its weight does not.
        norms["q_norm.weight"] = _norm_pairs(weights.q_norm_d) * scale
        norms["k_norm.weight"] = _norm_pairs(weights.k_norm_d)
        scale = 1.0
    value_YX = weights.v_GdX.flatten(0, 1)
    latent = Latent(value_YX, torch.eye(len(value_YX)).to(value_YX), kept=1.0)
    if second_XX is not None and layout.rank < len(value_YX):
        latent = compress(value_YX, second_XX, _value_weighting(weights), layout.rank)
    tensors = _assemble(
        query_HKX=blocks_GsGdX.flatten(2, 3).flatten(0, 1) * scale,
        rotary_PX=to_pairs(to_complex(weights.k_GdX)).flatten(0, 1),
        latent=latent,
        weights=weights,
        layout=layout,
    )
    return ConvertedLayer({**tensors, **norms}, latent.kept)


def _with_shared_key(
    weights: GroupedWeights,
    second_XX: Tensor,
    layout: Layout,
    turns: Turns | None,
    still_kept: float,
) -> ConvertedLayer:
    """Shared rotary components, and a latent of the rest of the keys and of the values."""
    if layout.is_narrow:
        assert turns is not None
        assert layout.kept is not None
        shared = fold_rotary_key(
            weights, second_XX, layout.kept, turns.mean, turns.beside(layout.kept), still_kept
        )
    else:
        shared = share_rotary_key(weights, second_XX, layout.components)
    plain_GsFX = shared.plain_GsFX
    if turns is not None:
        plain_GsFX = plain_GsFX * turns.mean[..., None].conj()
    plain_GsdX = to_halves(plain_GsFX) * layout.geometry.rotation_scale**2
    rest_GdX = to_halves(shared.rest_GFX)
    # One component is the steady one.
    latent = _joint_latent(plain_GsdX, rest_GdX, weights, second_XX, layout.rank - 1)
    latent = steadied(latent, second_XX, has_bias=layout.geometry.key_value_bias)
    query_GsKX = torch.cat((plain_GsdX, to_pairs(shared.query_GsSX)), dim=2)
    tensors = _assemble(
        query_HKX=query_GsKX.flatten(0, 1) * layout.query_scale,
        rotary_PX=to_pairs(shared.key_SX),
        latent=latent,
        weights=weights,
        layout=layout,
    )
    return ConvertedLayer(tensors, latent.kept)


def _joint_latent(
    query_GsdX: Tensor, rest_GdX: Tensor, weights: GroupedWeights, second_XX: Tensor, rank: int
) -> Latent:
    """Keys and values of all heads in one latent; both halves are worth the same in all."""
    queries_Gdd = torch.einsum("gsdx,xz,gsez->gde", query_GsdX, second_XX, query_GsdX)
    keys = Weighting.of(queries_Gdd)
    values = _value_weighting(weights)
    rest_YX, value_YX = rest_GdX.flatten(0, 1), weights.v_GdX.flatten(0, 1)
    of_keys = weighted_energy(rest_YX, second_XX, keys)
    of_values = weighted_energy(value_YX, second_XX, values)
    balance = (of_values / of_keys).sqrt() if of_keys > 0 else torch.ones_like(of_keys)
    return compress(
        torch.cat((rest_YX, value_YX)), second_XX, keys.scaled(balance).beside(values), rank
    )


def _value_weighting(weights: GroupedWeights) -> Weighting:
    return Weighting.of(torch.einsum("xgsd,xgse->gde", weights.o_DGsd, weights.o_DGsd))


def _assemble(
    query_HKX: Tensor, rotary_PX: Tensor, latent: Latent, weights: GroupedWeights, layout: Layout
) -> dict[str, Tensor]:
    """Tensors by MLA's names; in kv_b_proj each query head has its KV head's rows."""
    geometry = layout.geometry
    per_group, dim = geometry.heads // geometry.kv_heads, geometry.head_dim
    kv_a_YX = torch.cat((latent.down_RX, rotary_PX))
    keys_values = latent.up_YR.unflatten(0, (-1, geometry.kv_heads, dim))  # (1 or 2), G, d, R
    up_GYR = keys_values.transpose(0, 1).flatten(1, 2)
    tensors = {
        "q_proj.weight": query_HKX[..., :-1].flatten(0, 1),
        "kv_a_proj_with_mqa.weight": kv_a_YX[:, :-1],
        "kv_b_proj.weight": up_GYR.repeat_interleave(per_group, dim=0).flatten(0, 1),
        "o_proj.weight": weights.o_DGsd.flatten(1),
    }
    if latent.norm_R is not None:
        tensors["kv_a_layernorm.weight"] = latent.norm_R
    if geometry.query_bias:
        tensors["q_proj.bias"] = query_HKX[..., -1].flatten()
    if geometry.key_value_bias:
        tensors["kv_a_proj_with_mqa.bias"] = kv_a_YX[:, -1]
        tensors["o_proj.bias"] = weights.o_bias_D
    return tensors


def _norm_pairs(weight_d: Tensor) -> Tensor:
    """A norm's weight in the order of `to_pairs`."""
    return weight_d.unflatten(0, (2, -1)).T.flatten()
