"""The parts of a conversion on plain tensors: what is shared, what is lost, what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ic.conversion.distance import Turns
from ic.conversion.families import Geometry
from ic.conversion.grouped import GroupedWeights
from ic.conversion.latent import STEADINESS, Latent, Weighting, compress, steadied
from ic.conversion.layer import convert_layer
from ic.conversion.layout import Layout
from ic.conversion.moments import Moments
from ic.conversion.rotary import share_rotary_key, to_complex

GROUPS, PER_GROUP, DIM, HIDDEN = 4, 2, 8, 32


def geometry(**changes: Any) -> Geometry:
    sizes = {
        "family": "llama",
        "heads": GROUPS * PER_GROUP,
        "kv_heads": GROUPS,
        "head_dim": DIM,
        "hidden_size": HIDDEN,
        "layers": 1,
        "query_bias": True,
        "key_value_bias": True,
        "output_bias": True,
        "qk_norm": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return Geometry(**{**sizes, **changes})


@pytest.fixture
def weights() -> GroupedWeights:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    made = GroupedWeights(
        q_GsdX=torch.randn(GROUPS, PER_GROUP, DIM, HIDDEN + 1),
        k_GdX=torch.randn(GROUPS, DIM, HIDDEN + 1),
        v_GdX=torch.randn(GROUPS, DIM, HIDDEN + 1),
        o_DGsd=torch.randn(HIDDEN, GROUPS, PER_GROUP, DIM),
        o_bias_D=torch.randn(HIDDEN),
        q_norm_d=None,
        k_norm_d=None,
    )
    torch.set_default_dtype(torch.float32)
    return made


@pytest.fixture
def inputs() -> Tensor:
    """Inputs of very unequal directions, with a 1 behind each."""
    torch.manual_seed(1)
    mixing = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64) * torch.logspace(0, -2, HIDDEN)
    x_TD = torch.randn(500, HIDDEN, dtype=torch.float64) @ mixing + 0.3
    return torch.nn.functional.pad(x_TD, (0, 1), value=1.0)


def second_moment(inputs: Tensor) -> Tensor:
    moments = Moments(HIDDEN, torch.device("cpu"))
    for piece in inputs[:, :-1].split(77):
        moments.add(piece)
    return moments.second


def test_moments_are_those_of_all_tokens(inputs: Tensor) -> None:
    expected = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(second_moment(inputs), expected)


@pytest.mark.parametrize("components", [1, 2, 4])
def test_shared_key_and_rest_give_the_scores(
    weights: GroupedWeights, inputs: Tensor, components: int
) -> None:
    shared = share_rotary_key(weights, second_moment(inputs), components)
    x, y = inputs[0].to(torch.complex128), inputs[1].to(torch.complex128)
    turn_F = torch.polar(torch.ones(DIM // 2).double(), torch.linspace(0.3, 2.9, DIM // 2).double())
    query_GsF, key_GF = to_complex(weights.q_GsdX) @ x, to_complex(weights.k_GdX) @ y
    expected = torch.einsum("gsf,gf,f->gs", query_GsF.conj(), key_GF, turn_F).real
    rotary = torch.einsum(
        "gsr,r,r->gs", (shared.query_GsSX @ x).conj(), shared.key_SX @ y, turn_F.repeat(components)
    ).real
    rest = torch.einsum("gsf,gf,f->gs", query_GsF.conj(), shared.rest_GFX @ y, turn_F).real
    torch.testing.assert_close(rotary + rest, expected)
    if components == GROUPS:
        torch.testing.assert_close(rotary, expected)  # all components together leave no rest


def test_the_shared_key_holds_more_than_one_head_does(
    weights: GroupedWeights, inputs: Tensor
) -> None:
    """Weighted by the queries' size, no head's own key leaves as little to the other heads."""
    second = second_moment(inputs).to(torch.complex128)
    query, key = to_complex(weights.q_GsdX), to_complex(weights.k_GdX)
    size_GF = torch.einsum("gsfx,xy,gsfy->gf", query, second, query.conj()).real

    def energy(rest_GFX: Tensor) -> float:
        square = torch.einsum("gfx,xy,gfy->gf", rest_GFX, second, rest_GFX.conj()).real
        return float((square * size_GF).sum())

    ours = energy(share_rotary_key(weights, second.real, 1).rest_GFX)
    for group in range(GROUPS):  # the best multiples of that head's key, by least squares
        own = key[group]
        cross = torch.einsum("gfx,xy,fy->gf", key, second, own.conj())
        alone = torch.einsum("fx,xy,fy->f", own, second, own.conj())
        assert ours < energy(key - (cross / alone)[..., None] * own)


def test_a_latent_loses_what_the_smallest_singular_values_hold(inputs: Tensor) -> None:
    torch.manual_seed(2)
    rows_YX = torch.randn(24, HIDDEN + 1, dtype=torch.float64)
    blocks = torch.randn(3, 8, 8, dtype=torch.float64)
    weighting = Weighting.of(blocks @ blocks.mT)
    latent = compress(rows_YX, second_moment(inputs), weighting, rank=10)
    truth_TY = inputs @ rows_YX.T
    error_TY = (inputs @ latent.down_RX.T @ latent.up_YR.T - truth_TY) @ weighting.root_YY
    values = np.linalg.svd((truth_TY @ weighting.root_YY).numpy(), compute_uv=False)
    expected = (values[10:] ** 2).sum()
    assert float(error_TY.square().sum()) == pytest.approx(expected, rel=1e-8)
    assert latent.kept == pytest.approx(1 - expected / (values**2).sum(), rel=1e-10)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_norm_changes_a_steadied_latent_little(inputs: Tensor, has_bias: bool) -> None:
    torch.manual_seed(3)
    inputs[:, 0] = 2 + 0.02 * torch.randn(len(inputs))  # a direction that hardly changes
    inputs[7, 1:-1] *= 3  # a token with a latent three times as large
    second_XX = second_moment(inputs)
    down_RX = torch.randn(9, HIDDEN + 1, dtype=torch.float64)
    down_RX[:, -1] *= has_bias
    plain = Latent(down_RX, torch.randn(16, 9, dtype=torch.float64), kept=1.0)
    steady = steadied(plain, second_XX, has_bias=has_bias)
    latent_TR = inputs @ steady.down_RX.T
    assert (steady.down_RX[:, -1] == 0).all() or has_bias
    assert steady.norm_R is not None
    normed_TR = latent_TR * latent_TR.square().mean(1, keepdim=True).rsqrt() * steady.norm_R
    expected_TY = inputs @ down_RX.T @ plain.up_YR.T
    error_TY = normed_TR @ steady.up_YR.T - expected_TY
    # Without the steady component the large token is wrong by about two thirds.
    assert (error_TY.norm(dim=1) / expected_TY.norm(dim=1)).max() < 0.15
    assert error_TY.norm(dim=1).median() / expected_TY.norm(dim=1).median() < 0.03


def test_a_head_that_nothing_reads_leaves_numbers(weights: GroupedWeights, inputs: Tensor) -> None:
    """A query or an output of zeros makes a weighting singular."""
    weights.q_GsdX[1] = 0
    weights.o_DGsd[:, 2] = 0
    layout = Layout(geometry(), rope_dim=DIM, rank=20)
    converted = convert_layer(weights, second_moment(inputs), layout)
    assert all(tensor.isfinite().all() for tensor in converted.tensors.values())
    assert 0.5 < converted.kept < 1


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_at_full_rank_scores_and_outputs_come_back_where_nothing_turns(
    weights: GroupedWeights, inputs: Tensor, components: int, scale: float
) -> None:
    """YaRN's factor on cos and sin, biases, softmax's scale and the order of heads are all in it."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "attention_factor": scale}
    layout = Layout(geometry(rope_parameters=rope), components * DIM, rank=HIDDEN + 2)
    tensors = convert_layer(weights, second_moment(inputs), layout).tensors
    x_X, y_X = inputs[3], inputs[4]
    query_HK = (tensors["q_proj.weight"] @ x_X[:-1] + tensors["q_proj.bias"]).unflatten(
        0, (GROUPS * PER_GROUP, -1)
    )
    kv_a = tensors["kv_a_proj_with_mqa.weight"] @ y_X[:-1] + tensors["kv_a_proj_with_mqa.bias"]
    latent_R, rotary_P = kv_a.split([layout.rank, layout.rope_dim])
    # What the norm's weight takes back is what the norm divides by, where the latent is as usual.
    size = latent_R[-1].abs() * (1 + STEADINESS**-2) ** 0.5
    latent_R = latent_R * tensors["kv_a_layernorm.weight"] * layout.rank**0.5 / size
    kv_HNV = (tensors["kv_b_proj.weight"] @ latent_R).unflatten(0, (GROUPS * PER_GROUP, 2 * DIM))
    key_HN, value_HV = kv_HNV.split(DIM, dim=1)
    nope_HN, rope_HP = query_HK.split([DIM, layout.rope_dim], dim=1)
    # Cos and sin have the factor, so the rotated part of a score has its square.
    scores_H = (nope_HN * key_HN).sum(1) + scale**2 * (rope_HP @ rotary_P)
    expected = torch.einsum("gsd,gd->gs", weights.q_GsdX @ x_X, weights.k_GdX @ y_X).flatten() * (
        scale**2 / DIM**0.5
    )
    torch.testing.assert_close(scores_H / (DIM + layout.rope_dim) ** 0.5, expected)
    torch.testing.assert_close(
        tensors["o_proj.weight"] @ value_HV.flatten() + tensors["o_proj.bias"],
        torch.einsum("xgsd,gd->x", weights.o_DGsd, weights.v_GdX @ y_X) + weights.o_bias_D,
    )


def test_the_mean_turn_leaves_the_least_error_of_the_scores(
    weights: GroupedWeights, inputs: Tensor
) -> None:
    """Against sums over all pairs, one by one."""
    tokens = 40
    x_TX = inputs[:tokens] / 30
    x_TX[:, -1] = 1
    angle_TF = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.3, 0.05, 0.001]).double()
    rotation_TF = torch.polar(torch.ones_like(angle_TF), angle_TF)
    turns = Turns(weights, rotation_TF, scale=DIM**-0.5)
    turns.add(x_TX[:, :-1])
    for group, head in ((0, 0), (3, 1)):
        query_TF = to_complex(weights.q_GsdX[group, head]) @ x_TX.T.to(torch.complex128)
        key_TF = to_complex(weights.k_GdX[group]) @ x_TX.T.to(torch.complex128)
        query_TF, key_TF = query_TF.T * rotation_TF, key_TF.T * rotation_TF
        above, below = torch.zeros(DIM // 2, dtype=torch.complex128), 0.0
        for t in range(tokens // 8, tokens):
            score_T = (query_TF[t].conj() * key_TF[: t + 1]).sum(1).real * DIM**-0.5
            for s, attention in enumerate(score_T.softmax(0)[1:].tolist(), start=1):
                above += attention * torch.exp(1j * (angle_TF[s] - angle_TF[t]))
                below += attention
        torch.testing.assert_close(turns.mean[group, head], above / below, atol=1e-5, rtol=1e-5)
    # A frequency that hardly turns keeps all of its keys, a fast one little.
    size_F = turns.mean.abs().mean((0, 1))
    assert size_F[0] < 0.3 < 0.99 < size_F[-1]
