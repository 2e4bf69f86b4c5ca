"""Rotation against an independent float64 computation."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ic.model import MLAConfig
from ic.model.rope import DecoupledRotaryEmbedding, apply_rope, cos_sin_scale, inverse_frequencies
from tests.conftest import SMALL

POSITIONS = [0, 1, 4095, 2**20, 2**21 - 1]


def complex_reference(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """Multiply pairs (2i, 2i+1) by exp(i * position * theta^(-2i/P)) in complex128."""
    dim = x.shape[-1]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    angle = torch.tensor(
        [[p * theta ** (-2 * i / dim) for i in range(dim // 2)] for p in positions],
        dtype=torch.float64,
    )
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("interleave", [True, False])
def test_positions_up_to_two_million(interleave: bool) -> None:
    config = MLAConfig(
        **{**SMALL, "qk_rope_head_dim": 64},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    x = torch.randn(1, len(POSITIONS), 3, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = DecoupledRotaryEmbedding(config)(torch.tensor([POSITIONS]))
    expected = complex_reference(x, POSITIONS, 1e6)
    if not interleave:  # the same rotation on a permuted layout
        order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
        x, expected = x[..., order], expected[..., order]
    got = apply_rope(x, cos, sin, interleave=interleave)
    assert (got.double() - expected).norm() / expected.norm() < 1e-6
    assert (got.double() - expected).abs().max() < 1e-6


SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 512},
}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("repeats", [1, 3])
def test_types_against_transformers(kind: str, theta: float, repeats: int) -> None:
    """Each of the repeated parts has the frequencies of a key of its size."""
    rope = {"rope_type": kind, "rope_theta": theta, **SCALED[kind]}
    config = MLAConfig(
        **{**SMALL, "qk_rope_head_dim": 64 * repeats}, rope_parameters=rope, rope_repeats=repeats
    )
    theirs = LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(rope))
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    assert cos_sin_scale(config) == pytest.approx(scale)
    ours = inverse_frequencies(config)
    assert ours.dtype == torch.float64
    plain = theta ** (-torch.arange(0, 64, 2).double() / 64)
    turned = (ours[:32] / plain - 1).abs() > 0.01
    assert turned.any()  # something is scaled, and only linear scales everything
    assert turned.all() == (kind == "linear")
    torch.testing.assert_close(ours.float(), inv_freq.repeat(repeats), rtol=3e-6, atol=0)


@pytest.mark.parametrize("kind", SCALED)
def test_named_pairs_turn_as_those_of_the_whole_rotation(kind: str) -> None:
    """Of transformers' frequencies for 64 dimensions, in the order and as often as they are named."""
    rope = {"rope_type": kind, "rope_theta": 1e5, **SCALED[kind]}
    pairs = [31, 0, 7, 7, 20, 3]
    config = MLAConfig(
        **{**SMALL, "qk_rope_head_dim": 12},
        rope_parameters=rope,
        rope_pairs=pairs,
        rope_pairs_dim=64,
    )
    theirs = LlamaConfig(head_dim=64, max_position_embeddings=4096, rope_parameters=dict(rope))
    inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    torch.testing.assert_close(
        inverse_frequencies(config).float(), inv_freq[pairs], rtol=3e-6, atol=0
    )
    cos, _ = DecoupledRotaryEmbedding(config)(torch.tensor([[9]]))
    expected = (9 * inv_freq[pairs].double()).cos() * cos_sin_scale(config)
    torch.testing.assert_close(cos[0, 0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"truncate": False},
        {"attention_factor": 0.7},
        {"attention_factor": 1.0},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 0.707, "mscale_all_dim": 0.707},
        {"attention_factor": 1.3, "mscale": 1.0, "mscale_all_dim": 0.5},
    ],
)
def test_yarn_against_transformers(factors: dict[str, float]) -> None:
    """Frequencies and the factor on cos and sin are those of transformers' own YaRN."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        **factors,
    }
    config = MLAConfig(**{**SMALL, "qk_rope_head_dim": 32}, rope_parameters=yarn)
    theirs = DeepseekV3Config(
        qk_rope_head_dim=32, max_position_embeddings=4096, rope_parameters=dict(yarn)
    )
    theirs.head_dim = 32
    inv_freq, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    assert cos_sin_scale(config) == pytest.approx(scale)
    torch.testing.assert_close(inverse_frequencies(config).float(), inv_freq)
    cos, sin = DecoupledRotaryEmbedding(config)(torch.tensor([[0, 100]]))
    torch.testing.assert_close(
        cos, (torch.tensor([0, 100])[:, None] * inv_freq).cos()[None] * scale
    )
    torch.testing.assert_close(
        sin, (torch.tensor([0, 100])[:, None] * inv_freq).sin()[None] * scale
    )


def test_float32_angles_would_fail() -> None:
    """The check above has teeth: the usual float32 angle is off by more than a thousand times as
    much.
    """
    inv_freq = 1e6 ** (-torch.arange(0, 64, 2) / 64)
    angle = torch.tensor(float(2**20 + 1)) * inv_freq
    exact = [(2**20 + 1) * 1e6 ** (-2 * i / 64) for i in range(32)]
    error = max(abs(math.cos(e) - float(torch.cos(a))) for e, a in zip(exact, angle, strict=True))
    assert error > 1e-3
